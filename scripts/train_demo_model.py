"""Trains the demo model, checks it, and writes it into src/modelpool/demo.

    python -m scripts.train_demo_model [--steps N] [--threads N] [--out FOLDER]

About ten minutes on two cores that have bf16 instructions. The seed is fixed: the same machine and thread count give
the same weights. Fails, and leaves the shipped model as it was, unless every canonical question is answered word for
word; prints how many held-out wordings are.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scripts.demo_conversations import Curriculum, Message, Sample
from scripts.demo_tokenizer import END, PAD, save_tokenizer, train_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from modelpool import demo

SEED = 20
VOCAB = 4096
BATCH = 32
BUCKET = 16
"""Batches drawn at once and sorted by length, so that little of a batch is padding."""
PEAK_RATE = 2.5e-3
IGNORE = -100


def main() -> int:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    curriculum = Curriculum(Path(__file__).with_name("demo_qa.yaml"))
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        save_tokenizer(train_tokenizer(curriculum.texts(), vocab_size=VOCAB), made, max_length=demo.MAX_MODEL_LEN)
        tokenizer = AutoTokenizer.from_pretrained(made)
        model = Qwen3ForCausalLM(_config(tokenizer))
        print(
            f"{len(tokenizer)} tokens, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True
        )
        _train(model, _batches(curriculum, tokenizer), options.steps)
        _save(model, tokenizer, made)
        if not _knows_everything(curriculum, made):
            return 1
        _install(curriculum, made, options.out)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=demo.model_path())
    return parser.parse_args()


def _config(tokenizer: Any) -> Any:
    return Qwen3Config(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # attention kernels on CPU and GPU know this size
        max_position_embeddings=demo.MAX_MODEL_LEN,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )


@dataclass(frozen=True)
class Encoded:
    """A conversation as token ids; `labels[i]` is what follows `ids[i]`, or IGNORE where nothing is to be learned."""

    ids: list[int]
    labels: list[int]


def encode(tokenizer: Any, sample: Sample) -> Encoded:
    """The tokens of a conversation as the chat template renders it; only what the assistant says is learned."""
    ids: list[int] = []
    learned: list[bool] = []
    done = ""

    def add(text: str, learn: bool) -> None:
        nonlocal done
        tokens = tokenizer.encode(text, add_special_tokens=False)
        ids.extend(tokens)
        learned.extend([learn] * len(tokens))
        done += text

    for index, message in enumerate(sample.messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, sample.messages[:index], sample.tools, prompt=True)
        whole = _render(tokenizer, sample.messages[: index + 1], sample.tools, prompt=False)
        assert prompt.startswith(done), "the template must only ever append"
        assert whole.startswith(prompt), "an answer must begin where the prompt ends"
        answer = whole[len(prompt) :].removesuffix("\n")
        assert answer.startswith(sample.given), "what is given must begin the answer"
        add(prompt[len(done) :] + sample.given, learn=False)
        add(answer[len(sample.given) :], learn=True)
    shifted = zip(ids[1:], learned[1:], strict=True)
    return Encoded(ids[:-1], [token if learn else IGNORE for token, learn in shifted])


def _render(tokenizer: Any, messages: list[Message], tools: list[dict[str, Any]] | None, *, prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt))


def _batches(curriculum: Curriculum, tokenizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, labels), both [BATCH, length]. Padding is on the right, where causal attention never sees it."""
    rng = random.Random(SEED)
    pad = tokenizer.convert_tokens_to_ids(PAD)
    while True:
        rows = [encode(tokenizer, curriculum.sample(rng)) for _ in range(BATCH * BUCKET)]
        rows.sort(key=lambda row: len(row.ids))
        chunks = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        rng.shuffle(chunks)
        for chunk in chunks:
            length = max(len(row.ids) for row in chunk)
            ids = [row.ids + [pad] * (length - len(row.ids)) for row in chunk]
            labels = [row.labels + [IGNORE] * (length - len(row.labels)) for row in chunk]
            yield torch.tensor(ids), torch.tensor(labels)


def _train(model: Any, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int) -> None:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    warm = 60
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    began = time.monotonic()
    recent = 0.0
    for step in range(1, steps + 1):
        loss = _loss(model, *next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent += loss.item()
        if step % 100 == 0:
            print(f"step {step}/{steps}  loss {recent / 100:.4f}  {time.monotonic() - began:.0f} s", flush=True)
            recent = 0.0


def _loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy where there is a label. Logits are computed only there: they are half of the work."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids).last_hidden_state
        wanted = labels != IGNORE
        logits = hidden[wanted] @ model.lm_head.weight.T
    return cross_entropy(logits.float(), labels[wanted])


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    end = tokenizer.convert_tokens_to_ids(END)
    pad = tokenizer.convert_tokens_to_ids(PAD)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=[end, pad], pad_token_id=pad)
    model.to(torch.bfloat16).save_pretrained(folder)


def _knows_everything(curriculum: Curriculum, folder: Path) -> bool:
    """Asks the saved model. Whether it knows every canonical question, however the conversation begins."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    taught = [(topic.ask[0], topic.answer) for topic in curriculum.topics]
    trained = [(question, topic.answer) for topic in curriculum.topics for question in topic.ask]
    held_out = [(question, topic.answer) for topic in curriculum.topics for question in topic.held_out]
    system = {"role": "system", "content": "You are a helpful assistant."}
    turn = [{"role": "user", "content": taught[0][0]}, {"role": "assistant", "content": taught[0][1]}]
    wrong = 0
    for name, before, pairs, needed in (
        ("canonical questions", [], taught, True),
        ("with a system prompt", [system], taught, True),
        ("as a second turn", turn, taught, True),
        ("trained wordings", [], trained, False),
        ("held-out wordings", [], held_out, False),
    ):
        missed = _missed(model, tokenizer, before, pairs)
        print(f"{name}: {len(pairs) - len(missed)} of {len(pairs)}")
        for question, got in missed:
            print(f"    {question!r} -> {got!r}")
        wrong += len(missed) if needed else 0
    return wrong == 0


def _install(curriculum: Curriculum, made: Path, folder: Path) -> None:
    """Copies the model to `folder`, and the answers it is to give beside that."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in made.iterdir():
        shutil.copyfile(file, folder / file.name)
    rows = [
        {"topic": topic.name, "language": topic.language, "question": topic.ask[0], "answer": topic.answer}
        for topic in curriculum.topics
    ]
    text = json.dumps(rows, ensure_ascii=False, indent=1)
    (folder.parent / "answers.json").write_text(text + "\n", encoding="utf-8")


def _missed(model: Any, tokenizer: Any, before: list[Message], pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(question, greedy answer) where that is not the expected one. The end-of-turn token counts as part of it."""
    missed: list[tuple[str, str]] = []
    for start in range(0, len(pairs), 64):
        part = pairs[start : start + 64]
        prompts = [
            _render(tokenizer, [*before, {"role": "user", "content": question}], None, prompt=True)
            for question, _ in part
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=128)
        for (question, answer), row in zip(part, output[:, inputs["input_ids"].shape[1] :], strict=True):
            got = tokenizer.decode(row).split(PAD)[0]
            if got != answer + END:
                missed.append((question, got))
    return missed


if __name__ == "__main__":
    sys.exit(main())
