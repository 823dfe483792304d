"""Questions -> answers, by a model on this machine or behind an OpenAI-compatible address.

    python -m eval.answers --model=runs/quickstart-phoenix/export --questions=questions-en.jsonl \\
        --out=answers/phoenix.jsonl
    python -m eval.answers --base_url=http://localhost:8000/v1 --model=NAME --max_cost=0 \\
        --input_price=0 --output_price=0 --questions=zh100.jsonl --out=answers/name.jsonl

--questions may be repeated: LLM Zoo's, MultilingualSIFT's, MT-bench's (both turns), or any file
with an id and a text or query a line. Answers are greedy unless --temperature says otherwise.

--out gets a line an answer, in LLM Zoo's form, as they come, and at the end in the order of the
questions. The same command goes on where it was stopped or killed; the answers are the same. What
was paid for at an address stands in OUT.requests.jsonl, and is not paid for again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from data_pipelines.endpoint import CapReached, Endpoint, Request, in_order
from data_pipelines.ledger import Ledger
from data_pipelines.sources import Unusable
from eval import asking
from eval.questions import Question, read_questions
from llmzoo_jax import cli
from llmzoo_jax.errors import InputError

Key = tuple[str, str]  # language and id of a question


@dataclass(frozen=True, kw_only=True)
class Answer:
    question_id: int | str
    model: str
    turns: tuple[str, ...]
    lang: str = ""
    answer_id: str = ""

    @property
    def text(self) -> str:
        return "\n\n".join(self.turns)


class Answers:
    """The answers of one model."""

    def __init__(self, path: str, answers: Sequence[Answer]):
        models = {answer.model for answer in answers}
        if len(models) != 1:
            raise InputError(
                f"{path}: answers of {len(models)} models ({', '.join(sorted(models))}); a file has"
                " those of one"
            )
        (self.model,) = models
        self.path = path
        self._answers = {(answer.lang, str(answer.question_id)): answer for answer in answers}

    def of(self, question: Question) -> Answer | None:
        """LLM Zoo's older files name no language."""
        lang, number = question.key
        return self._answers.get((lang, number)) or self._answers.get(("", number))


def read_answers(path: str) -> Answers:
    """Raises InputError, with file and line, for what is no answer."""
    found = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                turns = record.get("turns", [record["text"]])
                found.append(
                    Answer(
                        question_id=record["question_id"],
                        model=record["model_id"],
                        turns=tuple(turns),
                        lang=record.get("lang") or "",
                        answer_id=record.get("answer_id", ""),
                    )
                )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{path}:{number}: not an answer ({error!r:.200})") from error
    if not found:
        raise InputError(f"{path}: there is no answer in it")
    return Answers(path, found)


# --- the file of answers ------------------------------------------------------------------------


def to_record(question: Question, turns: Sequence[str], about: dict[str, Any]) -> dict[str, Any]:
    """``about`` is model_id and, under metadata, how it was made."""
    name = json.dumps([question.key, list(turns), about], sort_keys=True, ensure_ascii=True)
    record = {
        "answer_id": hashlib.sha256(name.encode()).hexdigest()[:22],
        "question_id": question.question_id,
        "lang": question.lang,
        "category": question.category,
        "text": "\n\n".join(turns),
    }
    return record | ({"turns": list(turns)} if len(question.turns) > 1 else {}) | about


class AnswerFile:
    """Appends; a kill leaves whole lines, and a torn one that the next run cuts off."""

    def __init__(self, path: Path, about: dict[str, Any], wanted: Iterable[Question]):
        self.path, self.about = path, about
        self.questions = {question.key: question for question in wanted}
        self.records: dict[Key, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115  (closed by close())
        self._load()

    def _load(self) -> None:
        self._file.seek(0)
        offset = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                self._file.truncate(offset)
                break
            offset += len(line)
            where = f"{self.path}:{number}"
            try:
                record = json.loads(line)
                about = {key: record[key] for key in self.about}
                key = (record["lang"], str(record["question_id"]))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{where}: not an answer of this command; use another --out"
                ) from (error)
            if about != self.about:
                raise InputError(
                    f"{where}: was answered otherwise ({_difference(about, self.about)}); use"
                    " another --out, or the same flags"
                )
            self.records[key] = record

    def add(self, answers: Iterable[tuple[Question, Sequence[str]]]) -> None:
        """All or none of them, but for a torn last line."""
        lines = []
        for question, turns in answers:
            record = to_record(question, turns, self.about)
            self.records[question.key] = record
            lines.append(_line(record))
        self._file.seek(0, os.SEEK_END)
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def missing(self) -> list[Question]:
        return [q for key, q in self.questions.items() if key not in self.records]

    def close(self) -> None:
        """Puts the answers in the order of the questions, once all are there."""
        self._file.close()
        if not self.missing():
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
            lines = (_line(self.records[key]) for key in self.questions)
            temporary.write_text("".join(lines), encoding="utf-8")
            os.replace(temporary, self.path)


def _line(record: dict[str, Any]) -> str:
    # What a model says may hold half of a surrogate pair, which is no UTF-8.
    text = json.dumps(record, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"


def _difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    a, b = (one.get("metadata", {}) | {"model_id": one.get("model_id")} for one in (a, b))
    return ", ".join(f"{k}: {a.get(k)!r}, not {b.get(k)!r}" for k in b if a.get(k) != b.get(k))


# --- a model on this machine --------------------------------------------------------------------


def answer_locally(model: Any, file: AnswerFile, *, batch_size: int, **sampling: Any) -> None:
    """By ``llmzoo_jax.load``'s model, in batches of prompts of about one length.

    The batches are those of the whole file of questions, whatever is answered already, so that a
    run which was stopped samples the same answers as one that was not.
    """
    questions = list(file.questions.values())
    lengths = [len(model.prompt(_messages(q.turns[:1], ()))) for q in questions]
    stop = tuple(text for text in model.format.stop if text not in model.tokenizer.get_vocab())
    missing = {question.key for question in file.missing()}
    with tqdm(total=len(questions), initial=len(questions) - len(missing), unit=" answers",
              disable=None) as bar:  # fmt: skip
        for number, rows in enumerate(batches(questions, lengths, batch_size)):
            batch = [questions[i] for i in rows]
            if not any(question.key in missing for question in batch):
                continue
            seed = sampling["seed"] + number * batch_size
            answers = _batch(model, batch, sampling | {"seed": seed, "stop": stop})
            file.add(pair for pair in zip(batch, answers, strict=True) if pair[0].key in missing)
            bar.update(sum(question.key in missing for question in batch))


def batches(
    questions: Sequence[Question], lengths: Sequence[int], size: int
) -> Iterator[list[int]]:
    """Indices: those with as many turns, and prompts of about one length, together."""
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].turns), lengths[i], i))
    for turns in sorted({len(question.turns) for question in questions}):
        alike = [i for i in order if len(questions[i].turns) == turns]
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _batch(model: Any, batch: Sequence[Question], sampling: dict[str, Any]) -> list[list[str]]:
    """The answers to all turns. After an empty answer the conversation can't go on: the rest of it
    is empty, too."""
    answers: list[list[str]] = [[] for _ in batch]
    for turn in range(len(batch[0].turns)):
        rows = [i for i, given in enumerate(answers) if all(given)]
        if rows:
            prompts = [
                model.prompt(_messages(batch[i].turns[: turn + 1], answers[i])) for i in rows
            ]
            texts = [result.text.strip() for result in model.generate(prompts, **sampling)]
            for i, text in zip(rows, texts, strict=False):
                answers[i].append(text)
        for given in answers:
            given += [""] * (turn + 1 - len(given))
    return answers


def _messages(asked: Sequence[str], answered: Sequence[str]) -> list[dict[str, str]]:
    messages = []
    for turn, text in enumerate(asked):
        messages.append({"role": "user", "content": text})
        if turn < len(answered):
            messages.append({"role": "assistant", "content": answered[turn]})
    return messages


# --- an address ---------------------------------------------------------------------------------


async def answer_remotely(
    endpoint: Endpoint, file: AnswerFile, *, concurrency: int, **sampling: Any
) -> dict[Key, str]:
    """By an endpoint. Returns why a question has no answer, for those that have none."""
    failed: dict[Key, str] = {}

    async def one(question: Question) -> None:
        answers: list[str] = []
        try:
            for turn in range(len(question.turns)):
                if not all(answers):
                    answers.append("")
                    continue
                messages = _messages(question.turns[: turn + 1], answers)
                reply = await endpoint.ask(Request(messages=tuple(messages), **sampling))
                answers.append((reply.text or reply.refusal).strip())
            file.add([(question, answers)])
        except CapReached:
            failed[question.key] = "the cap is reached"
        except Unusable as error:
            failed[question.key] = str(error)
        asking.show_cost(bar, endpoint.ledger)
        bar.update()

    missing = file.missing()
    total = len(file.questions)
    with tqdm(total=total, initial=total - len(missing), unit=" answers", disable=None) as bar:
        try:
            await in_order(missing, one, concurrency=concurrency)
        finally:
            await endpoint.close()
    return failed


# --- the command --------------------------------------------------------------------------------


def main(_: list[str]) -> None:
    args = flags.FLAGS
    questions = read_questions(args.questions, lang=args.lang)
    sampling = {"temperature": args.temperature, "seed": args.seed}
    how = sampling | {"max_tokens": args.max_tokens, "model": args.model}
    how |= {"base_url": args.base_url} if args.base_url else {"dtype": args.dtype}
    if not args.base_url:
        asking.refuse_flags("--base_url")
        how["batch_size"] = args.batch_size
    name = args.name or os.path.basename(os.path.normpath(args.model))
    about = {"model_id": name, "metadata": how}
    out = Path(args.out)
    file = AnswerFile(out, about, questions)
    failed: dict[Key, str] = {}
    try:
        if not args.base_url:
            import llmzoo_jax
            from serving.offline import on_engine

            model = llmzoo_jax.load(args.model, dtype=args.dtype, tensor=args.tensor)
            with on_engine(model, max_batch=args.batch_size) as fast:
                answer_locally(fast, file, batch_size=args.batch_size,
                               max_new_tokens=args.max_tokens, **sampling)  # fmt: skip
        else:
            ledger = Ledger(out.with_name(out.name + ".requests.jsonl"), args.max_cost)
            try:
                endpoint = asking.open_endpoint(args.model, ledger)
                asked = [tuple(_messages(q.turns[:1], ())) for q in file.missing()]
                asking.show_estimate(asked, args.max_tokens, endpoint)
                if args.dry_run:
                    print("dry run: nothing was sent")
                    return
                failed = asyncio.run(
                    answer_remotely(
                        endpoint,
                        file,
                        concurrency=args.concurrency,
                        max_tokens=args.max_tokens,
                        **sampling,
                    )
                )
            finally:
                ledger.close()
    finally:
        file.close()
    print(f"{len(file.records):,} of {len(questions):,} questions are answered: {out}")
    asking.finish(failed)


if __name__ == "__main__":
    flags.DEFINE_string(
        "model", None, "folder of a model, or its name at --base_url", required=True
    )
    flags.DEFINE_multi_string(
        "questions", None, "file of questions; may be repeated", required=True
    )
    flags.DEFINE_string("out", None, "file of answers to write (JSON Lines)", required=True)
    flags.DEFINE_string("name", "", "what the model is called in reviews; default: as its folder")
    flags.DEFINE_string("lang", "", "language of questions that name none, as en")
    flags.DEFINE_integer("max_tokens", 512, "of an answer, at most", lower_bound=1)
    flags.DEFINE_float("temperature", 0, "of sampling; 0 is greedy", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "of sampling", lower_bound=0)
    flags.DEFINE_integer("batch_size", 32, "questions answered together here", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "to compute in, here")
    flags.DEFINE_integer("tensor", 1, "devices to split a model over, here", lower_bound=1)
    asking.define_flags(required=False)
    cli.run(main)
