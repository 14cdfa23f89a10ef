"""EleutherAI's lm-evaluation-harness on our models: the adapter, and the call that runs tasks.

    from gptjax.evaluation import harness  # needs lm_eval: pip install 'gptjax[lm-eval]'

    lm = gptjax.load("runs/quickstart")
    harness.evaluate_tasks(lm, ["lambada_openai", "piqa"], limit=100)["results"]

Requests of text come in, log-probabilities (nats) and texts go out, equal to those of the
harness's own model of transformers ("hf", at its default batch size of 1) on the same weights, but
where a token spans the border of context and continuation: "hf" scores what is left behind it.
Neither torch nor transformers is needed. Where "hf" ends in an assertion this one raises
UserError, but for an empty text to go on from: that begins after the prefix token.

To pass on another setting of generation, add a row to SETTINGS.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gptjax.config.errors import UserError, nearest, unknown_name
from gptjax.generation.language_model import LanguageModel, load
from gptjax.generation.pairs import Pair, align
from gptjax.tokenizer import chat_template as chat_template_lib

try:
    from lm_eval import simple_evaluate, utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.tasks import TaskManager
    from tqdm import tqdm
except ImportError as error:
    raise UserError(
        f"evaluation tasks need the package lm_eval ({error}): pip install 'gptjax[lm-eval]'"
    ) from None


# transformers' name of a setting: its name in `LanguageModel.generate`
SETTINGS = {
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "min_new_tokens": "min_new_tokens",
}


_GENERATED_ROWS = 32  # by default, at once
_SCORED_ROWS = 256  # between two steps of the progress bar; `LanguageModel.score` cuts them smaller
_MAX_NEW_TOKENS = 256  # the harness's default for tasks that set none
# Of transformers: what sampling gets where neither the task nor the checkpoint says.
_DEFAULT_TOP_K = 50
_MARK = "\ufdd1"  # a noncharacter: no text needs it


@register_model("gptjax")
class GptjaxLM(TemplateLM):
    """The adapter: what the harness calls a model.

    pretrained: a `LanguageModel`, or whatever `gptjax.load` opens, with its `options`. max_length:
    tokens seen at once, by default the context. batch_size: texts generated at once ("auto": the
    default). prefix_token_id: what the first token of a text depends on. device and
    max_batch_size: the harness passes them; JAX chooses the device, and scores have their own
    batches. Raises UserError.
    """

    def __init__(
        self,
        pretrained: LanguageModel | str | Path,
        *,
        max_length: int | None = None,
        batch_size: int | str | None = None,
        prefix_token_id: int | None = None,
        device: Any = None,
        max_batch_size: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.lm = (
            pretrained if isinstance(pretrained, LanguageModel) else load(pretrained, **options)
        )
        self.tokenizer = self.lm.text_tokenizer
        if self.lm.prompt_tokens:
            raise UserError(
                "the harness leaves no places for the learned prompt tokens of this checkpoint: "
                "tune it with lora.rank instead"
            )
        self.max_length = self.lm.config.context if max_length is None else int(max_length)
        if not 1 <= self.max_length <= self.lm.config.context:
            raise UserError(
                f"max_length = {max_length}: must be from 1 to the model's context, "
                f"{self.lm.config.context}"
            )
        rows = str(batch_size)
        self.batch_size = int(rows) if rows.isdecimal() and rows != "0" else _GENERATED_ROWS
        self.max_gen_toks = _MAX_NEW_TOKENS
        self._prefix = prefix_token_id
        self._control_names = {i: name for name, i in self.tokenizer.control.items()}

    def _special(self, role: str) -> int | None:
        """The id of what the tokenizer's files call "bos_token" or "eos_token"."""
        return self.tokenizer.control.get(self.tokenizer.special.get(role, ""))

    @property
    def eot_token_id(self) -> int:
        eos_id = self._special("eos_token")
        return self.tokenizer.eot if eos_id is None else eos_id

    @property
    def prefix_token_id(self) -> int:
        if self._prefix is not None:
            return self._prefix
        bos_id = self._special("bos_token")
        if bos_id is not None:
            return bos_id
        return self.tokenizer.bos_ids[0] if self.tokenizer.bos_ids else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which the harness keeps requests filled into a chat template."""
        return f"gptjax-{self.tokenizer.fingerprint}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text after the vocabulary's prefix (Llama's <s>; GPT-2 has none).

        A text that opens with the prefix does not get it twice. Names of control tokens become
        those tokens, as transformers has it: filled chat templates come this way.
        """
        if add_special_tokens is None:
            prefix = self._control_names.get(self.prefix_token_id)
            add_special_tokens = not (prefix and string.startswith(prefix))
        ids = self.tokenizer.encode_template(string)
        return [*self.tokenizer.bos_ids, *ids] if add_special_tokens else ids

    def tok_decode(self, tokens: Iterable[int]) -> str:
        """Text of the ids without control tokens, by the decoder that the checkpoint brought.

        What bytes that are no UTF-8 become depends on it.
        """
        vocab_size = self.tokenizer.vocab_size
        return self.tokenizer.decode_by_file([i for i in tokens if i < vocab_size])

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding would write it) of each.

        Where a token spans the border of context and continuation, the harness would score what
        is left of the continuation behind it, or nothing; here it is the text, as
        `LanguageModel.score` has it.
        """
        pairs = [(request.args, self._pair(*request.args)) for request in requests]
        return self._score(pairs, disable_tqdm)

    def _pair(self, context: str, continuation: str) -> Pair:
        """The ids of a pair of texts. An empty context is the prefix token."""
        if context:
            head = context.rstrip()
            prompt, whole = self.tok_encode(head), self.tok_encode(context + continuation)
            return align(prompt, whole, start=self.prefix_token_id)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        if ids[:1] == [self.prefix_token_id]:
            return Pair(ids[:1], ids[1:])
        return Pair([self.prefix_token_id], ids)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """`loglikelihood` of (key of the cache, context ids, continuation ids)."""
        pairs = [(key, Pair(context, continuation)) for key, context, continuation in requests]
        return self._score(pairs, disable_tqdm)

    def _score(
        self, pairs: Sequence[tuple[Any, Pair]], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """The scores of (key of the cache, pair), the context cut at its start where both are too
        long. Raises UserError.
        """
        rows = []
        for _, pair in pairs:
            if not 1 <= len(pair.completion) <= self.max_length:
                raise UserError(
                    f"a continuation has {len(pair.completion)} tokens: "
                    f"it must have from 1 to max_length = {self.max_length}"
                )
            # the last token is only a target
            places = self.max_length + 1 - max(len(pair.completion), len(pair.replaced))
            context = (pair.context or [self.prefix_token_id])[-places:]
            rows.append(Pair(context, pair.completion, pair.replaced))
        # slowest first: the bar's estimate only falls
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
        results = [(0.0, False)] * len(rows)
        with tqdm(total=len(rows), desc="loglikelihood", disable=disable_tqdm) as bar:
            for first in range(0, len(order), _SCORED_ROWS):
                part = order[first : first + _SCORED_ROWS]
                scores = self.lm.score_pairs([rows[i] for i in part])
                for i, score in zip(part, scores, strict=True):
                    results[i] = score
                    if pairs[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", pairs[i][0], score)
                bar.update(len(part))
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each complete text, every token once.

        A longer text goes in windows of max_length, the last of them with a full context.
        """
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in utils.get_rolling_token_windows(
                ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                windows.append((None, *utils.make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to one of its `until` texts, the end, or max_gen_toks.

        Requests of equal settings share batches.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        texts, count = [""] * len(requests), 0
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for members in groups.values():
                until, options = self._options(requests[members[0]].args[1])
                places = self.max_length - options["max_new_tokens"]
                prompts = {}
                for i in members:
                    ids = self.tok_encode(requests[i].args[0])[-places:]
                    prompts[i] = ids or [self.prefix_token_id]
                members.sort(key=lambda i: -len(prompts[i]))
                for first in range(0, len(members), self.batch_size):
                    part = members[first : first + self.batch_size]
                    # row k draws with seed + k
                    completions = self.lm.generate(
                        [prompts[i] for i in part], seed=count, **options
                    )
                    for i, completion in zip(part, completions, strict=True):
                        # not its text: one stop text can begin inside another, and the harness
                        # then cuts in the order of the list
                        text = self.tok_decode(self._up_to_stop(completion.tokens, until))
                        texts[i] = postprocess_generated_text(text, until, None)
                        self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    count += len(part)
                    bar.update(len(part))
        return texts

    def _up_to_stop(self, tokens: list[int], until: Sequence[str]) -> list[int]:
        """The tokens up to where the latest few spell a stop text: so the harness looks for it.

        More of them could change the text before: where a run of byte tokens is no UTF-8, a
        decoder with byte fallback makes every byte of it U+FFFD.
        """
        sizes = {}
        for stop in until:
            if stop:
                sizes[stop] = len(self.tok_encode(stop, add_special_tokens=False)) + 2
        for end in range(1, len(tokens) + 1):
            for stop, size in sizes.items():
                if stop in self.tok_decode(tokens[max(end - size, 0) : end]):
                    return tokens[:end]
        return tokens

    def _options(self, gen_kwargs: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """(stop texts, options of `LanguageModel.generate`) of a task's generation_kwargs.

        Greedy unless they say otherwise. Raises UserError.
        """
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        until = handle_stop_sequences(
            kwargs.pop("until"), eos=self._control_names.get(self.eot_token_id)
        )
        count, temperature = kwargs.pop("max_gen_toks"), float(kwargs.pop("temperature", 0.0))
        sample = kwargs.pop("do_sample")
        if not 1 <= count < self.max_length:
            raise UserError(
                f"a task asks for {count} new tokens: set max_gen_toks in its generation_kwargs, "
                f"from 1 to {self.max_length - 1}"
            )
        if sample and not temperature:
            raise UserError(
                "a task asks for do_sample without a temperature: set one in its generation_kwargs"
            )
        if kwargs.get("num_beams") == 1:
            del kwargs["num_beams"]
        for name in kwargs:
            if name not in SETTINGS:
                known = [*SETTINGS, "until", "max_gen_toks", "do_sample", "temperature"]
                raise UserError(unknown_name("setting in generation_kwargs", name, known))
        # generation_config.json, which transformers obeys as well
        stored = self.lm.source.generation if self.lm.source else {}
        chosen = {**stored, **kwargs}
        settings = {"top_k": _DEFAULT_TOP_K}
        settings |= {name: value for name, value in chosen.items() if value is not None}
        control = self.tokenizer.control
        options: dict[str, Any] = {
            option: settings[name] for name, option in SETTINGS.items() if name in settings
        }
        options["temperature"] = temperature if sample else 0.0
        options["max_new_tokens"] = count
        options["stop"] = [stop for stop in until if stop and not self._may_lose_space(stop)]
        options["stop_tokens"] = list(
            {self.eot_token_id, *(control[stop] for stop in until if stop in control)}
        )
        return until, options

    def _may_lose_space(self, stop: str) -> bool:
        """Whether a stop text begins with the space that the tokenizer puts before a first word.

        It is there while the text grows, and gone from it in the end.
        """
        return self.tokenizer.leading_space and stop.startswith(" ")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the checkpoint's template writes it, ready for an answer.

        Without add_generation_prompt, ready for more of its last message. Where the template
        refuses it, it is tried without what the system says. Raises UserError.
        """
        if not self.tokenizer.chat_template:
            raise UserError(
                "this checkpoint has no chat template: leave apply_chat_template out, "
                "or take a checkpoint tuned for dialogue"
            )
        try:
            return self._render(chat_history, add_generation_prompt)
        except UserError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            return self._render(others, add_generation_prompt)

    def _render(
        self, messages: Sequence[chat_template_lib.Message], add_generation_prompt: bool
    ) -> str:
        template = self.tokenizer.chat_template
        values: dict[str, Any] = {
            **self.tokenizer.special,
            "add_generation_prompt": add_generation_prompt,
        }
        if add_generation_prompt:
            return chat_template_lib.render(template, messages, **values)
        # the template closes the last message: a mark at the end of what it says shows where, and
        # a space after the mark whether the template trims
        marked = {**messages[-1], "content": f"{messages[-1]['content']}{_MARK} "}
        text, mark, rest = chat_template_lib.render(
            template, [*messages[:-1], marked], **values
        ).rpartition(_MARK)
        if not mark:
            raise UserError(
                "the chat template leaves out the last message, so nothing can go on from it"
            )
        return text if rest.startswith(" ") else text.rstrip()


def evaluate_tasks(
    lm: LanguageModel,
    tasks: str | Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` returns; `lm_eval.utils.make_table` prints it.

    "results" holds {task: {"metric,filter": value}}. tasks: names of tasks, groups or tags, or
    paths of YAML files. include_path: a folder of further tasks. limit: documents of each task,
    below 1 a share of them. num_fewshot: solved examples before each question. Raises UserError
    for an unknown task.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    if not names:
        raise UserError("no tasks: give at least one name")
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = nearest(name, manager.all_tasks)
            advice = f"; did you mean {near!r}?" if near else ": `lm_eval ls tasks` lists them"
            raise UserError(f"no task {name!r}{advice}")
    return simple_evaluate(
        model=GptjaxLM(lm),
        tasks=names,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        task_manager=manager,
        log_samples=False,
        torch_random_seed=None,  # which would import torch for its generator
    )
