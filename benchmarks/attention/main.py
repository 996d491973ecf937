"""From how many tokens on is cuDNN's attention faster than Keras' formula, forward and backward, on one GPU with XLA?

Products of self-attention over a batch of which all sequences together have 16384 tokens, in bfloat16, 16 heads.
"""

import argparse
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import harness

TOKENS = (32, 64, 128, 256, 512, 1024, 2048)


def parser():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--heads", type=int, nargs="+", default=(64, 128), help="sizes of heads")
    p.add_argument("--steps", type=int, default=30)
    return p


def seconds(head, tokens, causal, fused, steps):
    """The time of a pass there and back."""
    import keras
    import tensorflow as tf

    from tfpar.compat import _keras_attention

    shape = [16384 // tokens, tokens, 16, head]
    x = [tf.cast(tf.random.stateless_normal(shape, (0, n)), tf.bfloat16) for n in range(4)]

    @tf.function(jit_compile=True, autograph=False)
    def run(q, k, v, cotangent):
        with _keras_attention.fused(256 if fused else 0, lambda why: None), tf.GradientTape() as tape:
            tape.watch([q, k, v])
            y = keras.ops.dot_product_attention(q, k, v, is_causal=causal, flash_attention=fused or None)
        return tape.gradient(y, [q, k, v], cotangent)

    best = float("inf")
    for _ in range(3):
        run(*x)[0].numpy()
        began = time.perf_counter()
        for _ in range(steps):
            found = run(*x)
        found[0].numpy()
        best = min(best, (time.perf_counter() - began) / steps)
    return best


def main():
    options = parser().parse_args()
    rows = []
    for head in options.heads:
        for causal in (False, True):
            for tokens in TOKENS:
                plain, fused = (seconds(head, tokens, causal, way, options.steps) for way in (False, True))
                rows.append(
                    (f"{head}{', causal' if causal else ''}", f"{tokens}", f"{plain * 1e3:.2f} ms",
                     f"{fused * 1e3:.2f} ms", f"{plain / fused:.2f}")
                )  # fmt: skip
    harness.print_table("", ("size of a head", "tokens", "formula", "cuDNN", "times as fast"), rows)


if __name__ == "__main__":
    main()
