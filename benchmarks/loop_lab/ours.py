"""Contestant: the loop of ``kalmagrove train`` with our own Llama."""

from __future__ import annotations

from pathlib import Path

from kalmagrove.data.packing import open_packed
from kalmagrove.training.config import LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.environment import keep_freed_memory
from kalmagrove.training.run import StepResult
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.trainer import run_to_the_end
from loop_lab.turns import race_and_turns


def main() -> None:
    """Trains in turns."""
    race, turns = race_and_turns()
    never = race.steps + 1
    config = TrainConfig(
        model=ModelConfig(preset=race.preset),
        optim=OptimConfig(name="adamw", lr=race.lr),
        loop=LoopConfig(
            tokens=race.steps * race.batch_size * race.context_length,
            batch_size=race.batch_size,
            context_length=race.context_length,
            log_every=race.log_every,
            eval_every=never,
            save_every=never,
            precision="bf16",
            device="cpu",
        ),
    )
    keep_freed_memory()
    session = TrainingSession(config, open_packed(Path(race.data_folder)), Path(race.scratch) / "ours")
    advance = session.advance

    def advance_and_pause() -> StepResult:
        result = advance()
        turns.first_loss(result.loss)
        turns.step_ended()
        return result

    session.advance = advance_and_pause  # type: ignore[method-assign]
    turns.begin()
    run_to_the_end(session)


if __name__ == "__main__":
    main()
