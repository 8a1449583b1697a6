"""Trains a small byte-level language model with dynamic-mask attention on Python's own sources, on the CPU.

    python examples/demo/train.py                 about a minute of training
    python examples/demo/train.py --steps 300     the same result every time, to the bit, on one machine
    python examples/demo/train.py --resume        go on from the last checkpoint, interrupted or not

Writes checkpoint.pt, loss.png, heads.png and lifetimes.png to --out. Prints the loss on files held out of
the training beside that of a bigram model, a sample of the model's own, and the time of the attention beside
that of PyTorch's.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import report
from corpus import START, Corpus, bigram_loss, evaluation_windows, load_corpus, training_batch
from model import ByteModel, ModelConfig
from muon import make_optimizers
from progress import ProgressBar

BATCH_SIZE = 1
EVALUATION_WINDOWS = 32
EVALUATIONS = 6  # while training, the last one at its end
WARMUP_STEPS = 20
DECAY = 0.6  # share of the training at its end in which the learning rate falls to 0
SAMPLE_PROMPT = "import os\nimport sys\n\n\ndef "


@dataclass
class Run:
    """What a checkpoint holds."""

    model: ByteModel
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0  # spent training, evaluations left out
    training_losses: list[float] = field(default_factory=list)  # nats per byte, of every step
    times: list[float] = field(default_factory=list)  # seconds at the end of every step
    held_out: list[tuple[float, float]] = field(default_factory=list)  # (seconds, nats per byte)

    def save(self, path: Path) -> None:
        state = {
            name: getattr(self, name) for name in ("step", "seconds", "training_losses", "times", "held_out")
        }
        state["config"] = asdict(self.model.config)
        state["model"] = self.model.state_dict()
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)  # at no time is there half a checkpoint

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        if state["config"] != asdict(self.model.config):
            sys.exit(f"{path} holds another model, {state['config']}; remove it or choose another --out")
        self.model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(optimizer_state)
        for name in ("step", "seconds", "training_losses", "times", "held_out"):
            setattr(self, name, state[name])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--seconds", type=float, default=60.0, help="how long to train (default: 60)")
    limit.add_argument("--steps", type=int, help="train for this many steps instead")
    parser.add_argument("--seq-len", type=int, default=2048, help="bytes in a sequence (default: 2048)")
    parser.add_argument("--keep-window", type=int, default=256, help="keys that a query sees (default: 256)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_out"), help="folder for results (default: demo_out)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    arguments = parser.parse_args()
    for name in ("seconds", "steps", "seq_len", "keep_window"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')}: got {value}, expected more than 0")
    return arguments


def learning_rate_factor(step: int, fraction: float) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.0, 1 - fraction) / DECAY)


def training_step(run: Run, inputs: Tensor, targets: Tensor, factor: float) -> float:
    loss = functional.cross_entropy(run.model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("peak_lr", group["lr"])
        optimizer.step()
    run.model.zero_grad()
    return loss.item()


@torch.no_grad()
def held_out_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    losses = [functional.cross_entropy(model(x[None])[0], y).item() for x, y in zip(inputs, targets)]
    return sum(losses) / len(losses)


def train(run: Run, text: Tensor, evaluation: tuple[Tensor, Tensor], arguments: argparse.Namespace) -> bool:
    """False if Ctrl-C ended it. The step under way is finished and kept first."""
    interrupted = False

    def on_interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait

    def done() -> float:
        return run.step / arguments.steps if arguments.steps else run.seconds / arguments.seconds

    checkpoint = arguments.out / "checkpoint.pt"
    bar = ProgressBar()
    previous_handler = signal.signal(signal.SIGINT, on_interrupt)
    try:
        while done() < 1 and not interrupted:
            fraction = done()
            started = time.perf_counter()
            inputs, targets = training_batch(text, BATCH_SIZE, arguments.seq_len, arguments.seed, run.step)
            loss = training_step(run, inputs, targets, learning_rate_factor(run.step, fraction))
            run.step += 1
            run.seconds += time.perf_counter() - started
            run.training_losses.append(loss)
            run.times.append(run.seconds)
            if not math.isfinite(loss):
                sys.exit(f"the loss of step {run.step} is {loss}")
            if int(done() * EVALUATIONS) > int(fraction * EVALUATIONS) or done() >= 1:
                run.held_out.append((run.seconds, held_out_loss(run.model, *evaluation)))
                run.save(checkpoint)
            recent = sum(run.training_losses[-20:]) / len(run.training_losses[-20:])
            held_out = f", held-out {run.held_out[-1][1]:.3f}" if run.held_out else ""
            bar.show(
                min(1.0, done()),
                f"step {run.step}, {run.seconds:.0f} s, loss {recent:.3f}{held_out} nats/byte",
            )
    finally:
        bar.close()
        signal.signal(signal.SIGINT, previous_handler)
    if interrupted:
        run.save(checkpoint)
        print(
            f"Interrupted after step {run.step}. The model is in {checkpoint}; --resume goes on from there."
        )
    elif not run.held_out or run.held_out[-1][0] < run.seconds:  # a checkpoint that was already past the end
        run.held_out.append((run.seconds, held_out_loss(run.model, *evaluation)))
    return not interrupted


def introduce(corpus: Corpus, model: ByteModel, seqlen: int) -> None:
    config = model.config
    print(
        f"Text: {corpus.training_files} files of the standard library to train on, "
        f"{len(corpus.training):,} bytes; {corpus.held_out_files} held out, {len(corpus.held_out):,} bytes.\n"
        f"Model: {sum(p.numel() for p in model.parameters()):,} parameters; {config.layers} layers of "
        f"dynamic-mask attention, {config.heads} query heads on {config.heads_kv} key/value heads.\n"
        f"Of {seqlen} bytes each query sees the {config.keep_window} of highest score before it.\n"
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads."
    )


def show_results(
    run: Run, evaluation: tuple[Tensor, Tensor], bigram: float, arguments: argparse.Namespace
) -> None:
    loss, speed = run.held_out[-1][1], run.step * BATCH_SIZE * arguments.seq_len / run.seconds
    print(
        f"Trained {run.step} steps in {run.seconds:.1f} s, {speed:,.0f} bytes a second.\n"
        f"Held-out loss: {loss:.3f} nats per byte ({loss / math.log(2):.3f} bits). "
        f"A bigram model on the same {evaluation[1].numel():,} bytes: {bigram:.3f}."
    )
    report.draw_loss(run.times, run.training_losses, run.held_out, bigram, arguments.out / "loss.png")
    tokens = evaluation[0].roll(-(len(evaluation[0]) // 2), 0)  # the middle one first: it is drawn
    selections = run.model.selections(tokens)
    report.draw_heads(selections, tokens[0], arguments.out / "heads.png")
    report.draw_lifetimes(selections, arguments.keep_window, arguments.out / "lifetimes.png")
    print(f"Wrote loss.png, heads.png, lifetimes.png and checkpoint.pt to {arguments.out}.\n\nA sample:\n")
    prompt = torch.tensor([START, *SAMPLE_PROMPT.encode()])
    generator = torch.Generator().manual_seed(arguments.seed)
    sample = run.model.generate(prompt, 400, context=512, temperature=0.7, generator=generator)
    print(report.readable(sample[1:]), "\n")
    for seqlen in (arguments.seq_len, 4 * arguments.seq_len):
        print(report.time_attention(run.model.config, seqlen))


def main() -> int:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    corpus = load_corpus()
    evaluation = evaluation_windows(corpus.held_out, EVALUATION_WINDOWS, arguments.seq_len)
    bigram = bigram_loss(corpus.training, *evaluation)
    model = ByteModel(ModelConfig(keep_window=arguments.keep_window))
    run = Run(model, make_optimizers(model))
    checkpoint = arguments.out / "checkpoint.pt"
    if arguments.resume:
        if not checkpoint.exists():
            sys.exit(f"--resume: there is no {checkpoint}")
        run.load(checkpoint)
    introduce(corpus, model, arguments.seq_len)
    if not train(run, corpus.training, evaluation, arguments):
        return 130
    try:
        show_results(run, evaluation, bigram, arguments)
    except KeyboardInterrupt:
        print(f"\nInterrupted after the training. The model is in {checkpoint}.")
        return 130
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted before the training began.")
