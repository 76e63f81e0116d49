"""Let a model write through vLLM, in a process of its own: its memory is free again afterwards."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expertprune.errors import ServingError
from expertprune.files import digest_of, temporary_folder
from expertprune.models.loading import MUCH_FASTER, bfloat16_gain
from expertprune.serving import engine
from expertprune.serving.processes import ProcessTree, ending

_ROUNDS = 64  # samples of one prompt at most


@dataclass(frozen=True)
class Job:
    """What a model is to write.

    Attributes:
        folder: of the model.
        prompts: token ids.
        tokens: how many to write at least, if the prompts are enough for it.
        whole: whether only texts that come to an end count.
        length: of prompt and answer together, in tokens.
        temperature: 0 is greedy, and writes one answer to each prompt.
        seed: of the draws.
    """

    folder: str
    prompts: list[list[int]]
    tokens: int
    whole: bool
    length: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Sample:
    """What was written behind a prompt, with its number of tokens, and whether it came to an end."""

    prompt: int
    text: str
    tokens: int
    ended: bool


def generate(job: Job, log: Path) -> list[Sample]:
    """Run a job in a process of its own.

    Args:
        log: what vLLM prints.

    Raises:
        UsageError: vLLM is missing, or memory is short.
        ServingError: the process failed; the message holds its log's last lines.
    """
    on = engine.platform()
    engine.engine_settings(engine.check_folder(job.folder), on)
    with temporary_folder() as folder:
        asked, written = folder / "job.json", folder / "samples.jsonl"
        asked.write_text(json.dumps(asdict(job)), encoding="utf-8")
        command = [sys.executable, "-m", "expertprune.serving.generation", str(asked), str(written)]
        tree = ProcessTree(command, log, engine.environment(on))
        try:
            tree.start()
            while tree.alive:
                time.sleep(0.2)
        finally:
            tree.stop()
        if tree.code != 0:
            raise ServingError(
                f"{job.folder}: generation ended ({ending(tree.code)}); the end of its log, {log}:\n{tree.tail()}"
            )
        return [Sample(**json.loads(line)) for line in written.read_text(encoding="utf-8").splitlines()]


def samples(model: Any, job: Job) -> Iterator[Sample]:
    """Answers to all prompts, round after round with other draws, until there are enough tokens.

    Args:
        model: a `vllm.LLM`.
    """
    from vllm import SamplingParams

    total = 0
    for number in range(_ROUNDS if job.temperature else 1):
        settings = [
            SamplingParams(
                temperature=job.temperature,
                max_tokens=job.length - len(prompt),
                seed=int(digest_of([job.seed, number, place])[:8], 16),
                skip_special_tokens=not job.whole,  # in answers, they part thoughts and calls from what is said
                spaces_between_special_tokens=not job.whole,
            )
            for place, prompt in enumerate(job.prompts)
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in job.prompts]
        for place, answer in enumerate(model.generate(prompts, settings, use_tqdm=False)):
            (output,) = answer.outputs
            ended = output.finish_reason == "stop"
            total += len(output.token_ids) if ended or not job.whole else 0
            yield Sample(place, output.text, len(output.token_ids), ended)
        if total >= job.tokens or not total:  # another round would not end either
            return


def main(asked: str, written: str) -> None:
    """Run the job in one file, and write its samples into another."""
    job = Job(**json.loads(Path(asked).read_text(encoding="utf-8")))
    model = engine.load_engine(job.folder, max_model_len=job.length, **_on_a_cpu())
    lines = [json.dumps(asdict(sample)) + "\n" for sample in samples(model, job)]
    Path(written).write_text("".join(lines), encoding="utf-8")


def _on_a_cpu() -> dict[str, Any]:
    """Settings of an engine on a CPU.

    A prompt is read in one step: vLLM's CPU build (0.32.0) ends where a request with a seed is read in several. And
    weights are in float32 where the CPU multiplies bfloat16 much more slowly.
    """
    import torch

    if torch.accelerator.is_available():
        return {}
    whole: dict[str, Any] = {"enable_chunked_prefill": False}
    return whole | ({"dtype": "float32"} if bfloat16_gain() * MUCH_FASTER < 1 else {})


if __name__ == "__main__":
    main(*sys.argv[1:])
