"""Our models as a backend of lm-evaluation-harness: its class ``LM`` on top of ``llmzoo_jax.load``.

Texts become tokens as its own ``hf`` backend makes them (BOS, spaces at the seam, truncation), so
that figures can be compared with those of others.
"""

from __future__ import annotations

from typing import Any

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm

from eval import likelihood
from llmzoo_jax.errors import InputError

MAX_GEN_TOKS = 256  # where a task does not say, as in the hf backend
_KNOWN = {"do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks"}


class Backend(TemplateLM):
    """``model`` is what ``llmzoo_jax.load`` gives. ``max_length`` 0 is the model's own."""

    backend = "causal"

    def __init__(self, model: Any, *, batch_size: int = 16, max_length: int = 0, seed: int = 0):
        super().__init__()
        self.model, self.batch_size, self.seed = model, batch_size, seed
        self.max_length = max_length or likelihood.longest(model)
        self.tokenizer = model.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return likelihood.prefix_token(self.model)

    @property
    def tokenizer_name(self) -> str:
        return self.model.path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:
            begins = string.startswith(self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = not begins
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Without the system message where the format has none, as the hf backend does it."""

        def apply(messages):
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return apply(chat_history)
        except jinja2.exceptions.TemplateError:
            return apply([one for one in chat_history if one["role"] != "system"])

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm or None) as bar:
            scored = likelihood.likelihoods(
                self.model,
                [(context, continuation) for _, context, continuation in requests],
                batch_size=self.batch_size,
                max_length=self.max_length,
                on_done=bar.update,
            )
        for (pair, _, _), one in zip(requests, scored, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, tuple(one))
        return [tuple(one) for one in scored]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        pieces, owner = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for piece in likelihood.windows(tokens, self.prefix_token_id, self.max_length):
                pieces.append((None, *piece))
                owner.append(i)
        sums = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(pieces, disable_tqdm=disable_tqdm)
        for i, (logprob, _) in zip(owner, scored, strict=True):
            sums[i] += logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """By groups with the same parameters, prompts of about one length together."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate", disable=disable_tqdm or None) as bar:
            for rows in groups.values():
                asked = self._generation(requests[rows[0]].args[1])
                until, room = asked.pop("until"), self.max_length - asked["max_new_tokens"]
                prompts = {i: self.tok_encode(requests[i].args[0])[-room:] for i in rows}
                rows = sorted(rows, key=lambda i: (-len(prompts[i]), i))
                for start in range(0, len(rows), self.batch_size):
                    batch = rows[start : start + self.batch_size]
                    filled = [*batch, *batch[-1:] * (self.batch_size - len(batch))]
                    results = self.model.generate([prompts[i] for i in filled], **asked)
                    for i, result in zip(batch, results, strict=False):
                        text = self.tokenizer.decode(result.tokens, skip_special_tokens=True)
                        texts[i] = postprocess_generated_text(text, until, None)
                        self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    bar.update(len(batch))
        return texts

    def _generation(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of ``Model.generate``, and ``until``, of what a task asks for."""
        asked = normalize_gen_kwargs(dict(given), MAX_GEN_TOKS)
        if unknown := asked.keys() - _KNOWN:
            raise InputError(
                f"generation_kwargs: {', '.join(sorted(unknown))} can't be had; of use are"
                f" {', '.join(sorted(_KNOWN))}"
            )
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = [text for text in handle_stop_sequences(asked["until"], eos) if text]
        if not 0 < asked["max_gen_toks"] < self.max_length:
            raise InputError(
                f"generation_kwargs: max_gen_toks={asked['max_gen_toks']}; the model has"
                f" {self.max_length} positions for prompt and answer"
            )
        return {
            "until": until,
            "max_new_tokens": asked["max_gen_toks"],
            "temperature": float(asked.get("temperature", 0.0)) if asked["do_sample"] else 0.0,
            "top_k": int(asked.get("top_k", 0)),
            "top_p": float(asked.get("top_p", 1.0)),
            "seed": self.seed,
            "stop": until,
        }
