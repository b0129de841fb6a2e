"""One training step: the discriminator's update, then the generator's.

Source: RVC ``train_nsf_sim_cache_sid_load_pretrain.py``; Loshchilov & Hutter 2019 (AdamW).

The generator runs forward once. Its audio, cut off from its gradient, updates the
discriminator; the *updated* discriminator then judges the same audio for the
generator's loss. All of it is one function of (state, learning rate, inputs), compiled
once for each length of batch::

    generator forward -> audio -+-> stop -> discriminator loss -> discriminator update
                                |                                        |
                                +--> generator loss <--- new discriminator
                                           |
                                     generator update

Without the discriminator (see ``TrainStep.__call__``) only the lower branch is left, with
the mel and KL losses. A listener, which RVC has not, adds the content loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from rvc_mlx import compiling
from rvc_mlx.training.convolutions import Convolutions
from rvc_mlx.training.discriminators import Discriminator
from rvc_mlx.training.distributed import Group, frame_share, mean_gradients, rank_of
from rvc_mlx.training.forward import (
    Draws,
    Pass,
    bind,
    draw,
    generate,
    segments,
    spoken_items,
    step_inputs,
    training_network,
)
from rvc_mlx.training.listener import Listener
from rvc_mlx.training.losses import (
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    kl_loss,
    log_mel,
    mel_loss,
    multiscale_mel_loss,
    spectrogram,
)
from rvc_mlx.training.optimizer import (
    AdamW,
    first_counters,
    moments,
    next_scale,
    norm_of,
    update,
)
from rvc_mlx.training.parametrization import (
    Packing,
    Parameters,
    require_same,
    shapes,
)
from rvc_mlx.training.presets import TrainingConfig

if TYPE_CHECKING:
    from rvc_mlx.training.dataset import Batch

__all__ = ["AdamW", "Draws", "TrainStep", "draw"]

DTYPES = {"f32": mx.float32, "bf16": mx.bfloat16, "f16": mx.float16}

# Parameters and moments of the generator (g) and the discriminator (d), packed, and
# the counters.
State = dict[str, Any]
_PACKED = ("g", "g_mean", "g_square", "d", "d_mean", "d_square")


class TrainStep:
    """Trains a generator and a discriminator, one batch at a time.

    Parameters and moments are float32; with half precision the layers run in it, while
    the harmonic source, the spectrograms and all losses stay float32. A step whose
    gradients are not all finite changes neither parameters nor moments of that network.

    Args:
        config: sizes and loss weights.
        generator: parameters as ``parametrization.initial`` makes them.
        discriminator: likewise.
        optimizer: AdamW's numbers, for both networks.
        precision: ``"f32"``, ``"bf16"`` or ``"f16"``.
        listener: hears the content loss; none where ``config.content_weight`` is 0.
        world: devices that share each joint batch; None for one.
        convolutions: how convolutions are computed; None for what suits the device.
        compiled: how, see ``compiling``; None for traced on a GPU and not at all on the
            CPU, where it saves nothing that counts.

    Attributes:
        precision: as given.

    Raises:
        ValueError: the precision or the way to compile is unknown, or parameters or
            listener do not fit the configuration.
        RuntimeError: this MLX cannot compile that way.
    """

    def __init__(  # noqa: PLR0913 (each is chosen by itself)
        self,
        config: TrainingConfig,
        generator: Parameters,
        discriminator: Parameters,
        *,
        optimizer: AdamW | None = None,
        precision: str = "f32",
        listener: Listener | None = None,
        world: Group | None = None,
        convolutions: Convolutions | None = None,
        compiled: str | None = None,
    ):
        if precision not in DTYPES:
            raise ValueError(f"precision {precision!r}; expected one of {list(DTYPES)}")
        if (listener is not None) != (config.content_weight > 0):
            raise ValueError(
                f"content_weight is {config.content_weight:g} and there is "
                f"{'a' if listener else 'no'} listener; one goes with the other"
            )
        wanted = dict(zip("gd", shapes(config), strict=True))
        _require_shapes("generator", generator, wanted["g"])
        _require_shapes("discriminator", discriminator, wanted["d"])
        self.precision = precision
        self._config = config
        self._optimizer = optimizer or AdamW()
        self._dtype = DTYPES[precision]
        self._world, self._listener = world, listener
        convolutions = convolutions or Convolutions.fitting()
        self._network = training_network(config, convolutions.generator)
        self._judge = Discriminator(config, convolutions)
        self._packings = {part: Packing(names) for part, names in wanted.items()}
        self._state: State = {
            **self._with_moments("g", generator),
            **self._with_moments("d", discriminator),
            "counters": first_counters(self._optimizer, precision),
        }
        if compiled is None:
            on_gpu = mx.default_device().type == mx.DeviceType.gpu
            compiled = "traced" if on_gpu else "no"
        self._both = compiling.compiled(partial(self._step, judged=True), compiled)
        self._alone = compiling.compiled(partial(self._step, judged=False), compiled)

    def __call__(
        self, batch: Batch, draws: Draws, judged: bool = True
    ) -> dict[str, mx.array]:
        """Update both networks, or the generator alone.

        Args:
            batch: of ``dataset.TrainingSet``.
            draws: of ``forward.draw``.
            judged: False leaves the discriminator as it is and its losses out.

        Returns:
            Float32 scalars, on their way as the new state is: ``loss_g`` (the weighted
            sum) and its unweighted parts ``loss_mel``, ``loss_kl``, with a listener
            ``loss_content`` and, where judged, ``loss_adv``, ``loss_fm``;
            ``grad_norm_g``; where judged also ``loss_d`` and ``grad_norm_d``.
        """
        return self.advance(step_inputs(batch, draws), judged)

    def advance(
        self, inputs: dict[str, mx.array], judged: bool = True
    ) -> dict[str, mx.array]:
        """The same, of what ``forward.step_inputs`` makes of a batch and draws."""
        step = self._both if judged else self._alone
        self._state, losses = step(self._state, inputs)
        mx.async_eval(self._state, losses)
        return losses

    @property
    def state(self) -> dict[str, mx.array]:
        """Everything that the next step depends on, flat.

        Keys: ``g.NAME`` and ``d.NAME`` (parameters), ``g_mean.``, ``g_square.``,
        ``d_mean.``, ``d_square.`` (moments) and ``counters.``.
        """
        parts = {name: self._unpacked(name) for name in _PACKED}
        parts["counters"] = self._state["counters"]
        return {
            f"{part}.{name}": value
            for part, values in parts.items()
            for name, value in values.items()
        }

    @state.setter
    def state(self, flat: Mapping[str, mx.array]) -> None:
        own = self.state
        require_same(
            "state",
            {k: (v.shape, v.dtype) for k, v in flat.items()},
            {k: (v.shape, v.dtype) for k, v in own.items()},
        )

        def values_of(part: str) -> dict[str, mx.array]:
            start = f"{part}."
            return {
                name.removeprefix(start): mx.array(value)
                for name, value in flat.items()
                if name.startswith(start)
            }

        state: State = {
            part: self._packings[part[0]].pack(values_of(part)) for part in _PACKED
        }
        self._state = {**state, "counters": values_of("counters")}

    @property
    def generator(self) -> Parameters:
        """The generator's parameters now."""
        return self._unpacked("g")

    @property
    def discriminator(self) -> Parameters:
        """The discriminator's parameters now."""
        return self._unpacked("d")

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(np.array(self._state["counters"]["learning_rate"]))

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        counters = {**self._state["counters"], "learning_rate": mx.array(value)}
        self._state["counters"] = counters

    def _step(
        self, state: State, x: dict[str, mx.array], judged: bool
    ) -> tuple[State, dict[str, mx.array]]:
        """The whole step as a pure function."""
        config, counters = self._config, state["counters"]
        segment = config.segment_frames
        wave = x["wave"].reshape(*x["phone"].shape[:2], config.hop)
        real = segments(wave, x["starts"], segment).flatten(1)
        first = rank_of(self._world)[0] * len(real)
        from_prior = spoken_items(config.prior_share, len(real), first)

        def loss(weights: Parameters) -> tuple[mx.array, Any, Any]:
            bind(self._network, weights)
            made = generate(self._network, x, config, self._dtype, from_prior)
            losses = self._own_losses(x, real, made)
            if self._listener:
                heard = self._listener(wave, x["starts"], made.audio)
                losses["loss_content"] = heard
            of_d: State = {}
            if judged:
                audio = mx.stop_gradient(made.audio)
                of_d, of_judge = self._update_discriminator(state, real, audio)
                losses |= of_judge | self._judged_losses(of_d["d"], real, made.audio)
            losses["loss_g"] = self._total(losses, made.mask)
            return losses["loss_g"] * counters["scale"], losses, of_d

        (_, losses, of_d), gradient = self._slope("g", state["g"], loss)
        of_g, norm = self._update("g", state, gradient)
        norms = [norm, losses["grad_norm_d"]] if judged else [norm]
        finite = mx.all(mx.isfinite(mx.stack(norms)))
        counted = counters | of_d.get("counters", {}) | of_g["counters"]
        counted |= next_scale(counters, finite, self.precision)
        new = {**state, **of_d, **of_g, "counters": counted}
        return new, losses | {"grad_norm_g": norm}

    def _weights(self, part: str, vector: mx.array) -> Parameters:
        """Plain weights in the layers' precision, the harmonic source in float32."""
        return self._packings[part].plain(vector, "dec.m_source.", self._dtype)

    def _slope(
        self, part: str, vector: mx.array, loss: Callable[[Parameters], Any]
    ) -> tuple[Any, mx.array]:
        """What a loss of plain weights gives, and its slope for the packed parameters."""
        results, slopes = mx.value_and_grad(loss)(self._weights(part, vector))
        return results, self._packings[part].slope(vector, slopes)

    def _judged(self, audio: mx.array) -> list[list[mx.array]]:
        return self._judge(audio.astype(self._dtype))

    def _update_discriminator(
        self, state: State, real: mx.array, fake: mx.array
    ) -> tuple[State, dict[str, mx.array]]:
        """One update; real and generated audio are judged as one batch."""

        def loss(weights: Parameters) -> tuple[mx.array, mx.array]:
            bind(self._judge, weights)
            judged = self._judged(mx.concatenate([real, fake]))
            outputs = [mx.split(maps[-1], 2) for maps in judged]
            value = discriminator_loss(
                [[of_real] for of_real, _ in outputs],
                [[of_fake] for _, of_fake in outputs],
            )
            return value * state["counters"]["scale"], value

        (_, value), gradient = self._slope("d", state["d"], loss)
        new, norm = self._update("d", state, gradient)
        return new, {"loss_d": value, "grad_norm_d": norm}

    def _judged_losses(
        self, judge: mx.array, real: mx.array, made: mx.array
    ) -> dict[str, mx.array]:
        """The generator's losses against the updated discriminator."""
        bind(self._judge, self._weights("d", judge))
        # Real audio is judged apart: its half needs no way back.
        real_maps, fake_maps = self._judged(real), self._judged(made)
        return {
            "loss_adv": adversarial_loss(fake_maps),
            "loss_fm": feature_loss(real_maps, fake_maps),
        }

    def _own_losses(
        self, x: Mapping[str, mx.array], real: mx.array, made: Pass
    ) -> dict[str, mx.array]:
        """The generator's losses that need no discriminator."""
        config = self._config
        kl = kl_loss(made.z_p, made.logs_q, made.m_p, made.logs_p, made.mask)
        if config.mel_scales:
            mel = multiscale_mel_loss(real, made.audio, config)
        else:
            spec = segments(x["spec"], x["starts"], config.segment_frames)
            spoken = spectrogram(made.audio, config)
            mel = mel_loss(log_mel(spec, config), log_mel(spoken, config))
        return {"loss_mel": mel, "loss_kl": kl}

    def _total(self, losses: Mapping[str, mx.array], mask: mx.array) -> mx.array:
        """The weighted sum of the generator's losses."""
        share = frame_share(mx.sum(mask), self._world)
        total = self._config.mel_weight * losses["loss_mel"]
        if "loss_adv" in losses:
            total = losses["loss_adv"] + losses["loss_fm"] + total
        if "loss_content" in losses:
            total = self._config.content_weight * losses["loss_content"] + total
        return total + self._config.kl_weight * losses["loss_kl"] * share

    def _update(
        self, part: str, state: State, gradient: mx.array
    ) -> tuple[State, mx.array]:
        """New parameters, moments and count of one network, and its gradient's norm."""
        counters = state["counters"]
        vector = mean_gradients({part: gradient / counters["scale"]}, self._world)
        norm = norm_of(vector)
        finite = mx.isfinite(norm)
        count = counters[f"{part}_steps"] + finite.astype(mx.int32)
        names = (part, f"{part}_mean", f"{part}_square")
        parameters, mean, square = ({part: state[name]} for name in names)
        moved = update(
            self._optimizer,
            (parameters, mean, square),
            vector,
            counters["learning_rate"],
            count,
            finite,
        )
        new = {name: array[part] for name, array in zip(names, moved, strict=True)}
        return {**new, "counters": {f"{part}_steps": count}}, norm

    def _unpacked(self, part: str) -> Parameters:
        return self._packings[part[0]].unpack(self._state[part])

    def _with_moments(self, part: str, parameters: Parameters) -> State:
        vector = {part: self._packings[part].pack(parameters)}
        mean, square = moments(vector)
        return {
            part: vector[part],
            f"{part}_mean": mean[part],
            f"{part}_square": square[part],
        }


def _require_shapes(what: str, given: Parameters, wanted: Mapping) -> None:
    require_same(what, {name: value.shape for name, value in given.items()}, wanted)
