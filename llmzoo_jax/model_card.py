"""The README.md of an exported model: what a run's files say about it, and nothing else."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from llmzoo_jax import metrics
from llmzoo_jax.conversation import (
    ChatFormat,
    Conversation,
    ConversationError,
    Message,
    in_languages,
    read_jsonl,
    render,
)
from llmzoo_jax.lora import DEFAULT_TARGETS

MARK = "<!-- written by llmzoo_jax.export -->"  # how an earlier export is known as one

USE = """\
With transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{"role": "user", "content": QUESTION}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

With llmzoo_jax:

```python
import llmzoo_jax

model = llmzoo_jax.load("path/to/this/folder")
print(model.chat([{"role": "user", "content": QUESTION}]).text)
```

or, in a terminal, `python -m serving.chat --model=path/to/this/folder`.
"""


@dataclass
class Survey:
    """What the conversations of some files are."""

    languages: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    sources: Counter[tuple[str, str]] = field(default_factory=Counter)  # (source, licence)
    missing: list[str] = field(default_factory=list)  # files that can't be read any more
    example: Conversation | None = None  # the first, English if there is English


def survey(files: list[str], languages: list[str]) -> Survey:
    """Counts the conversations of JSON Lines files, those in ``languages`` (empty: all)."""
    found = Survey()
    for path in files:
        one = Survey()
        title = f"reading {Path(path).name}"
        try:
            for item in tqdm(
                read_jsonl(path), desc=title, unit=" conversations", delay=2, disable=None
            ):
                if not languages or in_languages(item.lang, languages):
                    _count(one, item)
        except ConversationError:  # the file has moved or changed since: nothing is known of it
            found.missing.append(Path(path).name)
            continue
        for name in ("languages", "kinds", "sources"):
            getattr(found, name).update(getattr(one, name))
        found.example = found.example or one.example
    return found


def _count(found: Survey, item: Conversation) -> None:
    found.languages[item.lang] += 1
    found.kinds[item.kind] += 1
    found.sources[item.source, item.license] += 1
    if found.example is None or (found.example.lang != "en" and item.lang == "en"):
        found.example = item


def write(
    run_dir: Path, run: dict[str, Any], *, content: Literal["model", "adapter"], step: int,
    chat_format: ChatFormat, num_params: int, dtype: str, plot: str | None,
) -> str:  # fmt: skip
    """The model card, as Markdown. ``run`` is the resolved config, ``plot`` a file beside it."""
    data = run["data"]
    train = survey([source["path"] for source in data["train"]], data["languages"])
    heldout = survey([source["path"] for source in data["heldout"]], data["languages"])
    base = base_model(run["init_from"])
    name = run_dir.resolve().name
    messages = train.example.messages if train.example else [Message("user", "Hello!")]
    question = next(m.content for m in messages if m.role == "user")
    sections = [
        _front_matter(run, train, base, content),
        f"# {name}\n\n{_summary(run, content, num_params, dtype, base)}",
        "## Use\n\n" + USE.replace("QUESTION", json.dumps(question, ensure_ascii=False)),
        _chat_section(chat_format, train.example),
        _data_section(train, heldout),
        _training_section(run, _records(run_dir), step, plot),
        MARK,
    ]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def base_model(init_from: str) -> str:
    """What a run began with, by its name on the hub where the folder tells it; "" if random."""
    hub = re.search(r"models--([^/]+?)--([^/]+)/snapshots/", Path(init_from).as_posix() + "/")
    return f"{hub[1]}/{hub[2]}" if hub else Path(init_from).name


def _front_matter(run: dict, train: Survey, base: str, content: str) -> str:
    """Quoted values, as YAML would take the language "no" for false."""
    languages = sorted(x for x in train.languages if x and x != "und")
    sources = sorted({source for source, _ in train.sources if re.fullmatch(r"[\w./-]+", source)})
    licences = {licence for _, licence in train.sources}
    fields: dict[str, Any] = {"language": languages}
    if not base and not train.missing and len(licences) == 1 and "" not in licences:
        fields["license"] = licences.pop().lower()  # what a base model adds to it, no file says
    library = {"model": "transformers", "adapter": "peft"}[content]
    fields |= {"library_name": library, "pipeline_tag": "text-generation"}
    fields["base_model"] = base if "/" in base else ""
    fields["tags"] = ["llmzoo_jax", run["model"]["family"], "conversational"]
    fields["datasets"] = sources
    lines = []
    for key, value in fields.items():
        if isinstance(value, list) and value:
            lines += [f"{key}:", *(f"- {json.dumps(x, ensure_ascii=False)}" for x in value)]
        elif value and not isinstance(value, list):
            lines.append(f"{key}: {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(["---", *lines, "---"])


def _summary(run: dict, content: str, num_params: int, dtype: str, base: str) -> str:
    family = {"bloom": "BLOOM", "llama": "LLaMA"}.get(
        run["model"]["family"], run["model"]["family"]
    )
    if content == "adapter":
        return (
            f"A LoRA adapter with {num_params:,} parameters for the {family} model `{base}`, "
            "trained with llmzoo_jax. Loading it needs `peft` and that model."
        )
    start = f"fine-tuned from `{base}`" if base else "trained from random weights"
    return (
        f"A chat model of the {family} architecture with {num_params:,} parameters ({dtype}), "
        f"{start} with llmzoo_jax."
    )


def _chat_section(chat_format: ChatFormat, example: Conversation | None) -> str:
    text = f"## Chat format\n\n`{chat_format.name}`; the tokenizer's chat template writes it."
    if example is None:
        return text
    turns = [m for m in example.messages if m.role != "assistant"][:2]
    turns = turns[: 1 + (turns[0].role == "system")]
    prompt = "".join(s.text for s in render(turns, chat_format, generation_prompt=True))
    stops = " or ".join(f"`{stop}`" for stop in chat_format.stop)
    return (
        text + " A prompt, up to where the model begins to speak:\n\n"
        f"~~~~text\n{prompt}\n~~~~\n\nAn answer ends with {stops}."
    )


def _data_section(train: Survey, heldout: Survey) -> str:
    parts = ["## Data"]
    for title, found in (("Training", train), ("Held out", heldout)):
        if found.sources:
            parts.append(f"{title}: {found.languages.total():,} conversations.")
            parts.append(
                _table(
                    ("source", "licence", "conversations"),
                    [
                        (s or "unknown", x or "unknown", f"{n:,}")
                        for (s, x), n in _most(found.sources)
                    ],
                )
            )
        if found.missing:
            names = ", ".join(f"`{name}`" for name in found.missing)
            parts.append(f"{title} data that could not be read at export: {names}.")
    if train.kinds:
        kinds = (f"{kind} {n:,}" for kind, n in _most(train.kinds))
        parts.append("Kinds of training conversations: " + ", ".join(kinds) + ".")
        spoken = (f"{lang} {n:,}" for lang, n in _most(train.languages))
        parts.append("Languages of training conversations: " + ", ".join(spoken) + ".")
    return "\n\n".join(parts)


def _most(counts: Counter) -> list[tuple[Any, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _records(run_dir: Path) -> list[dict[str, Any]]:
    return metrics.read(run_dir) if (run_dir / "metrics.jsonl").is_file() else []


def _training_section(run: dict, records: list[dict], step: int, plot: str | None) -> str:
    records = [record for record in records if record["step"] <= step]
    losses = [record for record in records if "loss" in record]
    held = [record for record in records if "heldout_loss" in record]
    B, T, optim = run["data"]["batch_size"], run["data"]["sequence_length"], run["optim"]
    rows = [("steps", f"{step:,}"), ("batch", f"{B} rows of {T:,} tokens")]
    if losses:
        steps = [0, *(record["step"] for record in losses)]
        packed = sum(
            (after - before) * record["packing"]
            for before, after, record in zip(steps, steps[1:], losses, strict=False)
        )
        tokens = float(f"{B * T * packed:.3g}")
        rows.append(("tokens", f"about {tokens:,.0f} (rows {packed / steps[-1]:.1%} full)"))
    rows.append(("learning rate", f"{optim['learning_rate']:g}, {optim['schedule']}"))
    if lora := run.get("lora"):
        on = ", ".join(lora["targets"] or DEFAULT_TARGETS[run["model"]["family"]])
        rows.append(("LoRA", f"rank {lora['rank']}, alpha {lora['alpha']:g} on {on}"))
        if lora["quantise"] != "none":
            rows.append(("frozen weights", lora["quantise"]))
    rows.append(("computed in", run["compute"]["dtype"]))
    if losses:
        rows.append(("training loss, last recorded", f"{losses[-1]['loss']:.4f}"))
    if held:
        at = "" if held[-1]["step"] == step else f" (at step {held[-1]['step']:,})"
        rows.append(("held-out loss", f"{held[-1]['heldout_loss']:.4f}{at}"))
    parts = ["## Training", _table(("", ""), rows)]
    if losses or held:
        parts.append("Losses are in nats a token, over the tokens of the answers.")
    if plot:
        parts.append(f"![Loss by step]({plot})")
    by_language = held[-1].get("heldout_by_language") if held else None
    if by_language:
        cells = [(lang, f"{loss:.4f}") for lang, loss in sorted(by_language.items())]
        parts += ["### Held-out loss by language", _table(("language", "loss"), cells)]
    return "\n\n".join(parts)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
