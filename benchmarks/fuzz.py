"""Small files that users bring, mutated: each is loaded, or refused in one message that names it.

    python benchmarks/fuzz.py [COUNT]

`config.json`, `adapter_config.json`, chat templates, prompt files and the headers of GGUF files are changed at random,
as JSON values and as bytes, and what is left is taken as the command line takes it. Anything but a result, `BadInput`
or `Refused` would reach a user as a traceback, and anything over a minute as a hang; both are failures.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import shutil
import signal
import string
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from common import keep
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unsleep.core import BadInput, Refused
from unsleep.models import generate
from unsleep.models.load import LoadConfig, load_model, quiet_transformers
from unsleep.prompts.sets import read_prompts

SECONDS, MEMORY = 60, 12 * 2**30
"""Time and address space that a mutant may take."""

SCALARS: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2**31,
    10**18,
    -(10**9),
    0.5,
    1e308,
    float("nan"),
    "",
    "x",
    "auto",
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}{{ strftime_now('%Y') }}"
)
PIECES = (
    "{{",
    "}}",
    "{%",
    "%}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if",
    "messages",
    "[0]",
    "['content']",
    "|",
)
PIECES += ("upper", "raise_exception('x')", "1/0", "namespace()", "loop", "{#", "''", "+", "strftime_now('%Y')", "%c")
PROMPTS = (
    '{"text": "one", "expected": "[a]"}\n{"text": "two", "system": "be kind"}\n'
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, '
    '{"role": "user", "content": "c"}]}\n'
)


def tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = TEMPLATE
    return made


def checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def adapter(folder: Path, base: Path) -> Path:
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(folder))
    return folder


def gguf_file(path: Path) -> Path:
    writer, d, hidden = gguf.GGUFWriter(path, "llama"), 16, 24
    letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    for name, value in {
        "context_length": 64,
        "embedding_length": d,
        "block_count": 1,
        "feed_forward_length": hidden,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_types([3, 3, *[1] * (len(letters) - 2)])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE.replace("{{ strftime_now('%Y') }}", ""))
    shapes = {"token_embd": (len(letters), d), "output_norm": (d,), "blk.0.attn_norm": (d,), "blk.0.ffn_norm": (d,)}
    shapes |= {"blk.0.attn_q": (d, d), "blk.0.attn_k": (8, d), "blk.0.attn_v": (8, d), "blk.0.attn_output": (d, d)}
    shapes |= {"blk.0.ffn_gate": (hidden, d), "blk.0.ffn_up": (hidden, d), "blk.0.ffn_down": (d, hidden)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.random.default_rng(0).normal(size=shape, scale=0.2).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Mutations


def mutated_bytes(data: bytes, draw: random.Random, first: int = 10**9) -> bytes:
    """Some bytes changed, put in, taken out, doubled or cut off, among the first so many."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        if not out:
            break
        at, way = draw.randrange(min(len(out), first)), draw.randrange(6)
        if way == 0:
            out[at] = draw.randrange(256)
        elif way == 1:
            out[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 4, 8))))
        elif way == 2:
            del out[at : at + draw.choice((1, 4, 64))]
        elif way == 3:
            out[at:at] = out[at : at + draw.choice((4, 64, 256))]
        elif way == 4:
            out[at : at + 4] = draw.choice((b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\1\0\0\0"))
        elif draw.random() < 0.2:
            del out[at:]
    return bytes(out)


def odd_value(draw: random.Random, depth: int = 0) -> Any:
    way = draw.random()
    if way < 0.7 or depth > 2:
        return draw.choice(SCALARS)
    if way < 0.85:
        return [odd_value(draw, depth + 1) for _ in range(draw.choice((0, 1, 3)))]
    return {draw.choice(string.ascii_lowercase): odd_value(draw, depth + 1) for _ in range(draw.choice((0, 1, 2)))}


def mutated_json(text: bytes, draw: random.Random) -> bytes:
    """Values of a JSON object replaced, dropped, renamed or swapped; one time in four its bytes changed."""
    if draw.random() < 0.25:
        return mutated_bytes(text, draw)
    value: dict[str, Any] = json.loads(text)
    for _ in range(draw.choice((1, 1, 2, 4))):
        key, way = draw.choice(list(value)), draw.randrange(5)
        if way < 2:
            value[key] = odd_value(draw)
        elif way == 2 and len(value) > 1:
            del value[key]
        elif way == 3:
            value[key + draw.choice(("s", "_", "\0"))] = value.pop(key)
        else:
            other = draw.choice(list(value))
            value[key], value[other] = value[other], value[key]
    return json.dumps(value).encode()


def mutated_template(text: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.5:
        return mutated_bytes(text, draw)
    words = text.decode()
    for _ in range(draw.choice((1, 2, 4))):
        at = draw.randrange(len(words) + 1)
        words = words[:at] + draw.choice(PIECES) + words[at + draw.choice((0, 0, 3, 12)) :]
    return words.encode()


def mutated_prompts(text: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.5:
        return mutated_bytes(text, draw)
    lines = text.splitlines()
    at = draw.randrange(len(lines))
    lines[at] = mutated_json(lines[at], draw)
    return b"\n".join(lines)


# Mutants


@contextlib.contextmanager
def limits() -> Generator[None]:
    """A minute and some memory for what runs inside."""

    def late(*_: object) -> None:
        raise TimeoutError(f"over {SECONDS} seconds")

    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def used(place: Path, template: Path | None = None) -> None:
    """Take a model as a stage does: load it, format a prompt, let it reply."""
    model = load_model(place, LoadConfig(chat_template=str(template) if template else None))
    generate.replies(model, ["hi"], max_new_tokens=2)


class Kind:
    """A file that is mutated, and what is done with it then."""

    def __init__(self, path: Path, change: Callable[[bytes, random.Random], bytes], use: Callable[[], object]) -> None:
        self.path, self.change, self.use, self.whole = path, change, use, path.read_bytes()

    def try_one(self, draw: random.Random) -> tuple[str, str]:
        """One mutant's outcome: `works`, `refused`, or `failed` with what was raised."""
        data = self.change(self.whole, draw)
        self.path.write_bytes(data)
        try:
            with limits(), quiet_transformers():
                self.use()
        except (BadInput, Refused) as error:
            said = str(error)
            return ("refused", said) if said.strip() and "\n" not in said.strip() else ("failed", f"message {said!r}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return "failed", f"{type(error).__name__}: {error} with {data[:2000]!r}"
        finally:
            self.path.write_bytes(self.whole)
        return "works", ""


def kinds(folder: Path) -> dict[str, Kind]:
    """Everything that is mutated, in a folder of its own."""
    base = checkpoint(folder / "base")
    own, over = shutil.copytree(base, folder / "own"), adapter(folder / "over", base)
    (folder / "t.jinja").write_text(TEMPLATE)
    (folder / "p.jsonl").write_text(PROMPTS)
    file = gguf_file(folder / "m.gguf")
    return {
        "config.json": Kind(own / "config.json", mutated_json, lambda: used(own)),
        "adapter_config.json": Kind(over / "adapter_config.json", mutated_json, lambda: used(over)),
        "chat template": Kind(folder / "t.jinja", mutated_template, lambda: used(base, folder / "t.jinja")),
        "prompt file": Kind(folder / "p.jsonl", mutated_prompts, lambda: read_prompts(folder / "p.jsonl")),
        "GGUF header": Kind(file, lambda data, draw: mutated_bytes(data, draw, 6000), lambda: used(file)),
    }


def fuzz(count: int, seed: int = 0) -> tuple[dict[str, Counter[str]], list[str]]:
    """So many mutants, as many of each kind: their outcomes, and what failed."""
    outcomes: dict[str, Counter[str]] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
        every = kinds(Path(scratch))
        for kind, mutants in every.items():
            outcomes[kind] = Counter()
            for number in range(count // len(every)):
                outcome, why = mutants.try_one(random.Random(f"{seed} {kind} {number}"))
                outcomes[kind][outcome] += 1
                if outcome == "failed":
                    failures.append(f"{kind} {number}: {why}")
    return outcomes, failures


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    outcomes, failures = fuzz(count)
    for kind, found in outcomes.items():
        print(f"{kind:<20} " + "  ".join(f"{name} {found[name]:,}" for name in ("works", "refused", "failed")))
    for failure in failures[:40]:
        print(failure[:600])
    figures = {"mutants": count, "outcomes": {k: dict(v) for k, v in outcomes.items()}, "failures": failures}
    print(keep("fuzz", figures))


if __name__ == "__main__":
    main()
