"""An engine's side of the device: the model, the cache, the compiled programs, and rows packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llmzoo_jax import compile_cache, lora, sharding
from llmzoo_jax.errors import InputError
from llmzoo_jax.inference import Model
from serving import adapters, programs, steps
from serving.rows import Row


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """``context``: tokens a request may have, prompt and answer. ``cache_tokens``: how many the
    cache holds, of all requests (0: a quarter of ``max_batch * context``, and one request at
    least). ``prefill_tokens``: of prompts, in one call. ``window``: steps in one call, or as many
    as take ``window_seconds``, since whoever comes in between waits; one while prompts are filled.
    ``kv_dtype``: "model" or "int8". ``deterministic``: the same shapes whatever runs, so that a
    request's logits are the same to the last bit; it begins when there is room for all of its
    answer. ``speculate``: tokens that are guessed, by a draft model or from what was said before,
    and verified in one step, while at most ``speculate_rows`` requests run. ``max_adapters`` LoRA
    adapters of up to ``max_lora_rank`` can be loaded at a time."""

    max_batch: int = 64
    context: int = 2048
    cache_tokens: int = 0
    page_size: int = 32
    prefill_tokens: int = 256
    window: int = 8
    window_seconds: float = 0.1
    max_waiting: int = 256
    kv_dtype: str = "model"
    prefix_cache: bool = True
    deterministic: bool = False
    speculate: int = 0
    speculate_rows: int = 4
    max_adapters: int = 0
    max_lora_rank: int = 64
    compile_at: str = "start"

    def __post_init__(self):
        for name in (
            "max_batch",
            "context",
            "page_size",
            "prefill_tokens",
            "window",
            "max_waiting",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be 1 or more")
        if self.window_seconds <= 0:
            raise InputError(f"window_seconds={self.window_seconds}: must be more than 0")
        if self.prefill_tokens % self.page_size:
            raise InputError(
                f"prefill_tokens={self.prefill_tokens} must be a multiple of page_size="
                f"{self.page_size}"
            )
        if not 0 <= self.speculate < self.page_size:
            raise InputError(f"speculate={self.speculate}: must be below page_size")
        if self.speculate and self.deterministic:
            raise InputError("speculate: shapes change, so there is no deterministic mode with it")
        if self.kv_dtype not in ("model", "int8"):
            raise InputError(f"kv_dtype={self.kv_dtype!r}: must be model or int8")
        if self.compile_at not in ("start", "first_use"):
            raise InputError(f"compile_at={self.compile_at!r}: must be start or first_use")

    @property
    def pages_a_row(self) -> int:
        return -(-self.context // self.page_size)

    @property
    def num_pages(self) -> int:
        tokens = self.cache_tokens or self.max_batch * self.context // 4
        return max(self.pages_a_row, -(-tokens // self.page_size))


class Runner:
    """``fill`` and ``decode`` change ``state``; after an error, ``reset`` makes it anew. Without
    ``scores`` prompts can't be scored, nor answers penalised."""

    def __init__(self, model: Model, options: EngineOptions, *, scores: bool = True):
        self.options = o = options
        self._scores = scores
        self.config, self.mesh = model.config, model.mesh
        params = model.params
        if o.max_adapters:
            params = adapters.attach(
                params, adapters=o.max_adapters, rank=o.max_lora_rank, dtype=model.dtype,
                mesh=model.mesh,
            )  # fmt: skip
        self._leaves, treedef = jax.tree.flatten(params)
        self._static = {"treedef": treedef, "dtype": model.dtype}
        devices = self._leaves[0].devices() if self.mesh is None else self.mesh.devices.flat
        self._devices = list(devices)
        self._platform = self._devices[0].platform
        # What the host gives with each call goes to every device.
        self._everywhere = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        self._sizes = programs.row_sizes(o)
        self._block_counts = programs.block_counts(o, self._platform)
        self._begins = programs.begin_sizes(o, self._platform)
        self._no_extras = {
            B: jax.device_put(steps.no_extras(B, model.config.vocab_size), self._everywhere)
            for B in self._sizes
        }
        self._programs: dict[Any, Any] = {}  # by kind and size
        self._kv_dtype = jnp.int8 if o.kv_dtype == "int8" else jnp.dtype(model.dtype)
        self.reset()
        arrays = jax.tree.leaves((self._leaves, self.state))
        shapes = [(x.aval, x.weak_type, x.format) for x in arrays]
        here = compile_cache.sources(Path(__file__).parent)
        self._key = (here, o, self.config, self._static, shapes)  # all that decides a program

    def fits(self, todo: Sequence[tuple[Row, int]], *, scored: bool) -> bool:
        """Whether one call of ``fill`` takes these pages."""
        blocks = sum(len(self._starts(row, n)) for row, n in todo)
        return blocks <= programs.most_blocks(self.options, self._platform, scored=scored)

    def _starts(self, row: Row, n: int) -> range:
        """Where the blocks of its page ``n`` start, up to the row's last token but one."""
        start, size = n * self.options.page_size, self.options.page_size
        end = min(start + size, len(row.tokens) - 1)
        return range(start, end, programs.block_size(self.options, self._platform))

    def reset(self) -> None:
        o = self.options
        self.state = steps.init_state(
            self.config, num_pages=o.num_pages, page_size=o.page_size, slots=o.max_batch,
            kv_dtype=self._kv_dtype, mesh=self.mesh,
        )  # fmt: skip

    def fill(self, todo: Sequence[tuple[Row, int]], scored: bool) -> None:
        """Pages of rows, as many as fit."""
        parts = [(row, n, start) for row, n in todo for start in self._starts(row, n)]
        R = next(count for count in self._block_counts if count >= len(parts))
        if scored:
            R = programs.most_blocks(self.options, self._platform, scored=True)
        blocks = programs.blocks(self.options, self._platform, R)
        T, tables = blocks.tokens.shape[1], []
        for i, (row, n, start) in enumerate(parts):
            part = row.tokens[start : min(start + T, len(row.tokens) - 1)]
            after = row.tokens[start + 1 : start + 1 + T]
            blocks.adapters[i], blocks.starts[i] = row.adapter, start
            blocks.tokens[i, : len(part)] = part
            blocks.targets[i, : len(after)] = after
            tables.append([page.number for page in row.pages[: n + 1]])
            blocks.tables[i, : n + 1] = tables[-1]
        work = self._pair_up(tables, R)
        program = self._program("prefill", R, bool(scored))
        self.state, scores = program(self._leaves, self.state, blocks, work)
        if scores is not None:
            scores = steps.Scores(*map(np.asarray, scores))
            for i, (row, _, start) in enumerate(parts):
                row.take_scores(scores, i, start)

    def decode(self, rows: Sequence[Row], limit: int) -> steps.Window:
        """Up to ``limit`` steps of ``rows``, whose pages have room for them; arrays of NumPy."""
        B = next(n for n in self._sizes if n >= len(rows))
        packed, work = self._pack(rows, B)
        self.state, window = self._program("decode", B)(
            self._leaves, self.state, packed, work, self._extras(rows, B), np.int32(limit)
        )
        if any(row.request.sampling.logprobs is not None for row in rows):
            return steps.Window(*map(np.asarray, window))
        return window._replace(tokens=np.asarray(window.tokens))

    def begin(self, row: Row) -> steps.Window:
        """The first step of a row, which reads all of its last page, too."""
        size = self.options.page_size
        part = row.tokens[(len(row.tokens) - 1) // size * size :]
        tokens = np.zeros((1, next(n for n in self._begins if n >= len(part))), np.int32)
        tokens[0, : len(part)] = part
        packed, work = self._pack([row], 1)
        self.state, window = self._program("begin", tokens.shape[1])(
            self._leaves, self.state, packed, work, self._extras([row], 1), tokens
        )
        return steps.Window(*map(np.asarray, window))

    def verify(self, rows: Sequence[Row], guesses: Sequence[Sequence[int]]) -> steps.Window:
        """One step of ``rows`` over what was guessed of each."""
        o = self.options
        B = next(n for n in self._sizes if n >= len(rows))
        packed, work = self._pack(rows, B)
        drafts = np.full((B, o.speculate), -1, np.int32)
        for line, guess in zip(drafts, guesses, strict=False):
            line[: len(guess)] = guess
        self.state, window = self._program("verify", B)(
            self._leaves, self.state, packed, work, self._extras(rows, B), drafts
        )
        return steps.Window(*map(np.asarray, window))

    def _pack(self, rows: Sequence[Row], B: int) -> tuple[np.ndarray, steps.Work]:
        packed = steps.pack_rows(B, self.options.pages_a_row + 1)
        for line, row in zip(packed, rows, strict=False):
            row.pack(line)
        return packed, self._pair_up([[page.number for page in row.pages] for row in rows], B)

    def set_counts(self, row: Row) -> None:
        V, n = self.config.vocab_size, len(row.request.prompt)
        in_prompt = np.zeros(V, bool)
        in_prompt[row.tokens[:n]] = True
        counts = np.bincount(np.asarray(row.tokens[n:], np.int64), minlength=V).astype(np.int16)
        self.state = self._program("set_counts")(self.state, np.int32(row.slot), in_prompt, counts)

    def copy_page(self, source: int, target: int) -> None:
        self.state = self._program("copy_page")(self.state, np.int32(source), np.int32(target))

    def put_adapter(self, slot: int, weights: lora.Adapters) -> None:
        """Writes an adapter into a slot that no row has; from any thread."""
        model = jax.tree.unflatten(self._static["treedef"], self._leaves)
        self._leaves = jax.tree.leaves(adapters.put(model, slot, weights))

    def warm_up(self) -> None:
        """Compiles every program, and keeps them: no call compiles later."""
        for name in programs.names(self.options, platform=self._platform, scores=self._scores):
            self._program(*name)

    def _program(self, *name: Any) -> Any:
        if name not in self._programs:

            def lower() -> jax.stages.Lowered:
                with sharding.use(self.mesh):
                    return programs.lower(
                        name, self.options, self.config, self._leaves, self.state,
                        platform=self._platform, everywhere=self._everywhere, **self._static,
                    )  # fmt: skip

            self._programs[name] = compile_cache.program(
                lower,
                key=(name, self._key),
                devices=self._devices,
                options=sharding.compiler_options(self.mesh),
            )
        return self._programs[name]

    def _pair_up(self, tables: Sequence[Sequence[int]], rows: int) -> steps.Work:
        return programs.pair_up(self.options, self.state, self._platform, tables, rows)

    def _extras(self, rows: Sequence[Row], B: int) -> steps.Extras:
        extras = self._no_extras[B]
        if any(row.request.sampling.logit_bias for row in rows):
            ids = np.full(extras.bias_ids.shape, -1, np.int32)
            bias = np.zeros(extras.bias.shape, np.float32)
            for i, row in enumerate(rows):
                for j, (token, value) in enumerate(row.request.sampling.logit_bias.items()):
                    ids[i, j], bias[i, j] = token, value
            extras = extras._replace(bias_ids=ids, bias=bias)
        if any(row.request.grammar is not None for row in rows):
            allowed = np.full(extras.allowed.shape, -1, np.int32)
            for i, row in enumerate(rows):
                if row.request.grammar is not None:
                    allowed[i] = row.request.grammar.mask()
            extras = extras._replace(allowed=allowed)
        return extras
