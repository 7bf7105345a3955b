"""YaRN: what a checkpoint says of it. `rope` has the table that it makes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from cuqwen.strict_json import PLAIN, Keys


@dataclass(frozen=True)
class Yarn:
    """Rotary angles stretched over a longer context, by the parameters of `rope_type` "yarn" (Peng et al., arXiv 2309.00071).
    `rope_table` says what they do."""

    factor: float  # >= 1
    original_max_position_embeddings: int  # the context that the model was trained with
    attention_factor: float  # of cosines and sines
    beta_fast: float  # pairs that turn more often than this over the original context keep their angles
    beta_slow: float  # those that turn less often are stretched by all of `factor`
    truncate: bool  # whether the bounds between them are whole pairs


def read_rope(keys: Keys) -> tuple[float, Yarn | None]:
    """rope_theta, from the top level, from rope_parameters (transformers 5), or both if they agree; and the scaling."""
    found: dict[str, float] = {}
    scalings: dict[str, Yarn | None] = {}
    if keys.values.get("rope_theta") is not None:
        found["rope_theta"] = keys.positive("rope_theta")
    for name in ("rope_parameters", "rope_scaling"):
        inner = keys.values.get(name)
        if inner is None:
            continue
        if not isinstance(inner, dict):
            keys.fail(name, "an object or null", inner)
        nested = Keys({f"{name}.{key}": value for key, value in inner.items()}, keys.where)
        if nested.values.get(f"{name}.rope_theta") is not None:
            found[f"{name}.rope_theta"] = nested.positive(f"{name}.rope_theta")
        scalings[name] = _read_scaling(nested, name)
    if not found:
        keys.required("rope_theta", "a finite number > 0, here or in rope_parameters")
    for name, theta in found.items():
        if theta != next(iter(found.values())):
            keys.fail(name, f"the same as {next(iter(found))} = {next(iter(found.values()))}", theta)
    if scalings.get("rope_scaling") is not None and scalings.get("rope_parameters", True) is None:
        del scalings["rope_parameters"]  # as in transformers: rope_scaling switches on what rope_parameters leaves out
    if len(set(scalings.values())) > 1:
        keys.fail("rope_scaling", "what rope_parameters says", keys.values["rope_scaling"])
    theta, scaling = next(iter(found.values())), next(iter(scalings.values()), None)
    if scaling is not None and theta <= 1:
        keys.fail("rope_theta", "a number > 1 for YaRN", theta)
    return theta, scaling


def _read_scaling(nested: Keys, name: str) -> Yarn | None:
    """What the object `name` says beyond rope_theta. transformers takes the kind for "default" where none is named."""
    kinds = [key for key in (f"{name}.rope_type", f"{name}.type") if key in nested.values]
    for key in kinds:
        nested.choice(key, ("default", "yarn"), "Remove the scaling to run within the original context length")
        if nested.values[key] != nested.values[kinds[0]]:
            nested.fail(key, f"the same as {kinds[0]} = {nested.values[kinds[0]]!r}", nested.values[key])
    is_yarn = bool(kinds) and nested.values[kinds[0]] == "yarn"
    known = {"rope_type", "type", "rope_theta"}
    if is_yarn:
        known |= {field.name for field in fields(Yarn)} | {"mscale", "mscale_all_dim"}
    for key, value in nested.values.items():
        whole = key.endswith(".partial_rotary_factor") and value == 1
        if key.removeprefix(f"{name}.") not in known and value is not None and not whole:
            kind = "YaRN" if is_yarn else "plain RoPE"
            nested.fail(key, f"no such key: {kind} has {', '.join(sorted(known - {'type'}))} only", value, PLAIN)
    if not is_yarn:
        return None

    def number(key: str) -> float | None:
        full = f"{name}.{key}"
        return None if nested.values.get(full) is None else nested.positive(full)

    factor = nested.positive(f"{name}.factor")
    if factor < 1:
        nested.fail(f"{name}.factor", "a number from 1", factor)
    attention_factor, mscale, mscale_all_dim = number("attention_factor"), number("mscale"), number("mscale_all_dim")
    if attention_factor is None:  # the paper's; the ratio is DeepSeek's, which transformers computes for all
        attention_factor = _growth(factor, 1.0)
        if mscale is not None and mscale_all_dim is not None:
            attention_factor = _growth(factor, mscale) / _growth(factor, mscale_all_dim)
    beta_fast, beta_slow = number("beta_fast") or 32.0, number("beta_slow") or 1.0
    if beta_fast < beta_slow:
        nested.fail(f"{name}.beta_fast", f"at least beta_slow = {beta_slow}", beta_fast)
    return Yarn(
        factor=factor,
        original_max_position_embeddings=nested.integer(f"{name}.original_max_position_embeddings"),
        attention_factor=attention_factor,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=f"{name}.truncate" not in nested.values or nested.boolean(f"{name}.truncate"),
    )


def _growth(factor: float, scale: float) -> float:
    """By what YaRN multiplies the length of queries and keys when the context is `factor` times as long."""
    return 0.1 * scale * math.log(factor) + 1.0
