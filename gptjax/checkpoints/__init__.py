"""Files of weights to (config, params, tokenizer) and back: workdirs, Hugging Face, GGUF, PEFT."""
