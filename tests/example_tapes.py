"""A step written by hand, for tests of what is done with tapes. Its numbers add up and mean nothing."""

from __future__ import annotations

from memplan.tape import Category, Part, Phase, Tape

MIB = 1 << 20


def example_tape(layers: int = 6, weights: int = 1024 * MIB) -> Tape:
    """Layers that leave an activation each, a loss, a backward that lets go of them, an optimizer."""
    tape = Tape()
    tape.begin(Phase.SETUP, "weights", part=Part.LOADED)
    tape.module = "model.embed_tokens"
    tape.alloc(weights // 2, "parameter", Category.WEIGHTS)
    for layer in range(layers):
        tape.begin(Phase.SETUP, "layer weights", layer, Part.LOADED)
        tape.module = "mlp"
        tape.alloc(weights // 2 // layers, "parameter", Category.WEIGHTS)
        tape.alloc(weights // 8 // layers, "state", Category.OPTIMIZER_STATE)
    tape.begin(Phase.FORWARD, "embed")
    tape.module = "model.embed_tokens"
    kept = [tape.alloc(64 * MIB, "embedding", Category.ACTIVATIONS)]
    for layer in range(layers):
        tape.begin(Phase.FORWARD, "layer", layer)
        for module in ("self_attn", "mlp"):
            tape.module = module
            held = [tape.alloc(size * MIB, "mm", Category.TEMPORARIES) for size in (96, 16, 48)]
            for storage in held:
                tape.free(storage)
        kept.append(tape.alloc(64 * MIB, "add", Category.ACTIVATIONS))
    tape.begin(Phase.FORWARD, "head")
    tape.module = "lm_head"
    logits = [tape.alloc(200 * MIB, "mm", Category.LOGITS_AND_LOSS) for _ in range(2)]
    gradients = []
    tape.begin(Phase.BACKWARD, "backward")
    for storage in logits:
        tape.free(storage)
    for layer in reversed(range(layers)):
        tape.begin(Phase.BACKWARD, "backward", layer)
        tape.module = "mlp"
        tape.free(tape.alloc(128 * MIB, "mm", Category.TEMPORARIES))
        gradients.append(tape.alloc(weights // 8 // layers, "mm", Category.GRADIENTS))
        tape.free(kept.pop())
    tape.begin(Phase.OPTIMIZER, "step")
    tape.module = "optimizer"
    tape.free(kept.pop())
    for storage in gradients:
        tape.free(storage)
    tape.finish()
    return tape
