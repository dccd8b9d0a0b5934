"""The training loop: schedule, log, checkpoints that chain their hashes, resume to the same bits."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from presage.core.errors import CheckpointError
from presage.train.data import Corpus
from presage.train.model import Llama, load_weights
from presage.train.optim import make_optimizers
from presage.train.recipe import Recipe

MAX_GRAD_NORM = 1.0


class Trainer:
    """One run in a folder: ``recipe.json``, ``train_log.jsonl``, ``checkpoints/step_NNNNNN``. Continues from the last checkpoint there."""

    def __init__(self, recipe: Recipe, corpus: Corpus, out: Path) -> None:
        self.recipe, self.corpus, self.out = recipe, corpus, out
        self.model = Llama(recipe.shape, recipe.seed)
        self.optimizers = make_optimizers(self.model, recipe.muon_lr, recipe.momentum, recipe.weight_decay, recipe.adam_lr)
        self.step, self._chain = 0, ""
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        (out / "recipe.json").write_text(json.dumps({**asdict(recipe), "digest": recipe.digest(), "manifest": corpus.manifest}, indent=1))
        self._resume()

    def run(self, until: int | None = None) -> None:
        """Train up to step ``until`` (the recipe's last by default), with a checkpoint every so often and at the end."""
        until = min(until or self.recipe.steps, self.recipe.steps)
        started = time.perf_counter()
        while self.step < until:
            record = self._one_step()
            self.step += 1
            self._log({**record, "step": self.step, "seconds": round(time.perf_counter() - started, 3)})
            if self.step % self.recipe.checkpoint_every == 0 or self.step == until:
                self.save()

    def validate(self) -> float:
        """Mean loss in nats per token over the recipe's validation windows."""
        windows = self.corpus.windows(self.recipe.validation_windows, self.recipe.length)
        with torch.no_grad():
            losses = [float(self._loss(windows[i : i + 1])) for i in range(len(windows))]
        return float(np.mean(losses))

    def save(self) -> Path:
        """Weights, optimiser state and a record that holds the hashes of weights, recipe, data and the checkpoint before."""
        folder = self.out / "checkpoints" / f"step_{self.step:06}"
        folder.mkdir(exist_ok=True)
        save_file({n: t.detach().contiguous() for n, t in self.model.state_dict().items()}, folder / "model.safetensors")
        torch.save([o.state_dict() for o in self.optimizers], folder / "optimizer.pt")
        record = {
            "step": self.step,
            "tokens": self.step * self.recipe.batch * self.recipe.length,
            "validation_loss": self.validate(),
            "weights": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
            "recipe": self.recipe.digest(),
            "manifest": self.corpus.manifest,
            "before": self._chain,
        }
        text = json.dumps(record, indent=1)
        # The record is written last: a checkpoint without one was cut off and is not resumed from.
        (folder / "record.json").write_text(text)
        self._chain = hashlib.sha256(text.encode()).hexdigest()
        return folder

    def _one_step(self) -> dict[str, Any]:
        ids = self.corpus.batch(self.recipe.seed, self.step, self.recipe.batch, self.recipe.length)
        loss = self._loss(ids)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        scale = schedule(self.recipe, self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        batch = hashlib.sha256(ids.tobytes()).hexdigest()[:16]
        return {
            "loss": loss.item(),
            "lr_scale": scale,
            "grad_norm": norm.item(),
            "tokens": (self.step + 1) * ids[:, 1:].size,
            "batch": batch,
        }

    def _loss(self, ids: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(ids)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.autocast):
            logits = self.model(x[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())

    def _log(self, record: dict[str, Any]) -> None:
        with (self.out / "train_log.jsonl").open("a") as f:
            f.write(json.dumps(record) + "\n")

    def _resume(self) -> None:
        found = sorted((self.out / "checkpoints").glob("step_*/record.json"))
        if not found:
            return
        text = found[-1].read_text()
        record = json.loads(text)
        for key, ours in (("recipe", self.recipe.digest()), ("manifest", self.corpus.manifest)):
            if record[key] != ours:
                raise CheckpointError(f"{found[-1].parent} belongs to another {key}; train into an empty folder")
        folder = found[-1].parent
        if hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() != record["weights"]:
            raise CheckpointError(f"{folder}/model.safetensors is not the file that its record.json describes")
        load_weights(self.model, folder / "model.safetensors")
        for optimizer, state in zip(self.optimizers, torch.load(folder / "optimizer.pt", weights_only=True), strict=True):
            optimizer.load_state_dict(state)
        self.step, self._chain = record["step"], hashlib.sha256(text.encode()).hexdigest()
        self._trim_log()

    def _trim_log(self) -> None:
        """Steps after the checkpoint are about to be run again."""
        log = self.out / "train_log.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))


def schedule(recipe: Recipe, step: int) -> float:
    """Share of the peak rate at a step: linear warm-up, flat, linear down to ``last``."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    begin = recipe.flat * recipe.steps
    if step < begin:
        return 1.0
    return 1.0 - (1.0 - recipe.last) * (step - begin) / max(1.0, recipe.steps - begin)
