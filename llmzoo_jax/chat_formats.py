"""Chat formats, as data: which text stands around each message. Standard library only.

``conversation.render`` writes text from it, ``conversation.chat_template`` a jinja template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a conversation is written: data, so that a new format is a new row of ``FORMATS``.

    A turn is ``prefix + content + suffix``, a conversation is ``begin`` and its turns, with nothing
    between. Of an assistant turn, ``trained`` says which end of the prefix and which beginning of
    the suffix are targets of the loss beside the content, and ``prompt`` is the beginning of the
    prefix that is written for the model; what follows it, the model writes itself.
    """

    name: str
    user: tuple[str, str] = ("", "")
    assistant: tuple[str, str] = ("", "")
    trained: tuple[str, str] = ("", "")
    prompt: str = ""
    stop: tuple[str, ...] = ()  # what ends an assistant turn
    system: tuple[str, str] = ("", "")
    tool: tuple[str, str] | None = None  # None: the format has no such turns
    default_system: str = ""  # the system message of conversations that have none
    system_in_user: bool = False  # written inside the first user turn, before its content
    strip: bool = False  # contents lose the white space at both ends
    begin: str = ""  # BOS, where the tokenizer puts one first (set by tokenizer.resolve_format)
    special_tokens: tuple[str, ...] = ()  # each must be one token
    # What writes everything instead of the fields above, for a checkpoint that brings its own
    # template: (messages, generation_prompt) -> segments, with the jinja text in `.source`.
    template: Any = None

    def __post_init__(self):
        before, after = self.assistant
        trained = before.endswith(self.trained[0]) and after.startswith(self.trained[1])
        if not trained or not before.startswith(self.prompt):
            raise ValueError(f"chat format {self.name}: prompt, trained and assistant disagree")


def _header(role: str) -> tuple[str, str]:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"


def _im(role: str) -> tuple[str, str]:
    return f"<|im_start|>{role}\n", "<|im_end|>\n"


_FORMATS = (
    # LLM Zoo: llmzoo/datasets/datasets.py, `default_conversation`; the assistant's opening <s> is a
    # target of the loss.
    ChatFormat(
        name="phoenix",
        default_system="A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.",
        system=("", "\n\n"),
        user=("Human: <s>", "</s>"),
        assistant=("Assistant: <s>", "</s>"),
        prompt="Assistant: <s>",
        trained=("<s>", "</s>"),
        stop=("</s>",),
        special_tokens=("<s>", "</s>"),
    ),
    # Stanford Alpaca: train.py, `prompt_no_input`; nothing stands between "### Response:" and the
    # answer. It has one turn; further ones are set apart by an empty line.
    ChatFormat(
        name="alpaca",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
        system=("", "\n\n"),
        user=("### Instruction:\n", "\n\n"),
        assistant=("### Response:", "</s>\n\n"),
        prompt="### Response:",
        trained=("", "</s>"),
        stop=("</s>",),
        special_tokens=("</s>",),
    ),
    # FastChat: conversation.py, `vicuna_v1.1` (ADD_COLON_TWO, sep " ", sep2 "</s>").
    ChatFormat(
        name="vicuna",
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        system=("", " "),
        user=("USER: ", " "),
        assistant=("ASSISTANT: ", "</s>"),
        prompt="ASSISTANT:",
        trained=(" ", "</s>"),
        stop=("</s>",),
        special_tokens=("</s>",),
    ),
    # meta-llama/Llama-2-7b-chat-hf: its template; every user turn opens with BOS.
    ChatFormat(
        name="llama-2",
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        system_in_user=True,
        user=("<s>[INST] ", " [/INST]"),
        assistant=(" ", " </s>"),
        trained=(" ", " </s>"),
        stop=("</s>",),
        strip=True,
        special_tokens=("<s>", "</s>"),
    ),
    # meta-llama/Meta-Llama-3-8B-Instruct: its template; BOS comes from the tokenizer.
    ChatFormat(
        name="llama-3",
        system=_header("system"),
        user=_header("user"),
        assistant=_header("assistant"),
        tool=_header("ipython"),
        prompt=_header("assistant")[0],
        trained=("", "<|eot_id|>"),
        stop=("<|eot_id|>",),
        strip=True,
        special_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    ChatFormat(
        name="chatml",
        system=_im("system"),
        user=_im("user"),
        assistant=_im("assistant"),
        tool=_im("tool"),
        prompt=_im("assistant")[0],
        trained=("", "<|im_end|>"),
        stop=("<|im_end|>",),
        special_tokens=("<|im_start|>", "<|im_end|>"),
    ),
)
FORMATS: dict[str, ChatFormat] = {f.name: f for f in _FORMATS}
