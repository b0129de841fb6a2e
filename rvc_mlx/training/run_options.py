"""How long and how a voice is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunOptions:
    """One run's settings; those of the voice's sizes are in ``TrainingConfig``.

    Attributes:
        epochs: passes over the data.
        batch_size: items per step and device.
        learning_rate: of the first epoch.
        decay: factor of the learning rate per epoch.
        precision: of the networks: ``"f32"``, ``"bf16"`` or ``"f16"``.
        adversarial_from: steps after which the discriminator joins in.
        seed: of data order and all draws.
        save_every: epochs between kept voices and checkpoints.
        save_steps: steps between saves of the state; 0 for by the clock only.
        save_minutes: minutes between saves of the state.
        patience: stop after so many validations without a better score; 0 for never.
        log_steps: steps between rows of the log.
        validate_every: epochs between validations; the last epoch always has one.
    """

    epochs: int = 200
    batch_size: int = 4
    learning_rate: float = 1e-4
    decay: float = 0.999875
    precision: str = "f32"
    adversarial_from: int = 0
    seed: int = 1234
    save_every: int = 10
    save_steps: int = 0
    save_minutes: float = 5.0
    patience: int = 0
    log_steps: int = 10
    validate_every: int = 1
