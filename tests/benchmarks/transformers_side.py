"""A server around ``transformers.generate``, for ``tests.benchmarks.serve``.

    python -m tests.benchmarks.transformers_side --model=DIR --port=8001

Whoever waits when the model is free becomes one batch, padded on the left, which decodes until its
longest answer is done. Answers come whole: its first token is its last.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import torch
import transformers
import uvicorn
from absl import app, flags
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODEL = flags.DEFINE_string("model", None, "Hugging Face folder.", required=True)
PORT = flags.DEFINE_integer("port", 8001, "Port to listen at.")
MAX_BATCH = flags.DEFINE_integer("max_batch", 64, "Requests of a batch, at most.")


@dataclass(eq=False)
class Job:
    body: dict
    done: asyncio.Future


def generate(model, bodies: Sequence[dict]) -> None:
    """One batch; ``bodies`` are of /v1/completions, with token ids and the same sampling."""
    longest = max(len(body["prompt"]) for body in bodies)
    ids = torch.zeros((len(bodies), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, body in enumerate(bodies):
        ids[i, longest - len(body["prompt"]) :] = torch.tensor(body["prompt"])
        mask[i, longest - len(body["prompt"]) :] = 1
    temperature = bodies[0]["temperature"]
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    with torch.inference_mode():
        model.generate(
            input_ids=ids, attention_mask=mask, use_cache=True, pad_token_id=0,
            max_new_tokens=max(body["max_tokens"] for body in bodies), **how,
        )  # fmt: skip


def main(_) -> None:
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL.value, dtype=torch.float32)
    model.eval().generation_config.eos_token_id = None
    waiting: asyncio.Queue[Job] = asyncio.Queue()

    async def work() -> None:
        while True:
            jobs = [await waiting.get()]
            await asyncio.sleep(0.005)  # those who come together
            while not waiting.empty() and len(jobs) < MAX_BATCH.value:
                jobs.append(waiting.get_nowait())
            await asyncio.to_thread(generate, model, [job.body for job in jobs])
            for job in jobs:
                job.done.set_result(None)

    async def complete(request: Request) -> Response:
        job = Job(await request.json(), asyncio.get_running_loop().create_future())
        waiting.put_nowait(job)

        async def events() -> AsyncIterator[str]:
            await job.done
            usage = {"completion_tokens": job.body["max_tokens"]}
            for event in ({"choices": [{"text": ""}]}, {"choices": [], "usage": usage}):
                yield f"data: {json.dumps(event)}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def health(_: Request) -> Response:
        return JSONResponse({})

    async def serve() -> None:
        routes = [Route("/v1/completions", complete, methods=["POST"]), Route("/health", health)]
        config = uvicorn.Config(Starlette(routes=routes), port=PORT.value, log_level="warning")
        task = asyncio.ensure_future(work())
        await uvicorn.Server(config).serve()
        task.cancel()

    asyncio.run(serve())


if __name__ == "__main__":
    app.run(main)
