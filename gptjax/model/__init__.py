"""Parameters and the forward pass of one decoder: GPT-2 and the Llama family by config."""
