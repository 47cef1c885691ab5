"""Decode with experts of 8 and 4 bits: one token through a layer's experts, against bf16, in one interleaved run.

Time is the median of ``--pairs`` rounds, in each of which every format has its turn. Bytes are those of all experts.

    python benchmarks/quantized_cpu.py --threads 2
"""

import argparse
import statistics
import time

import torch

from moesaic.ops import experts_mlp, quantize

SHAPES = {"128 experts": (128, 8, 2048, 768), "8 experts": (8, 2, 2048, 3584)}  # experts, top-k, model and hidden dim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| shape | format | MB | us a call | tokens/s | time of bf16 over it |\n|---|---|---|---|---|---|")
    for shape, (E, K, D, F) in SHAPES.items():
        weights = [torch.randn(E, *sizes).mul_(sizes[0] ** -0.5) for sizes in ((D, F), (D, F), (F, D))]
        # Laid out as in checkpoints: the summed dim is contiguous.
        forms = {"bf16": [w.bfloat16().mT.contiguous().mT for w in weights]}
        forms |= {f: [quantize(w, f) for w in weights] for f in ("int8", "nf4", "mxfp4")}
        x, routing = torch.randn(args.tokens, D).bfloat16(), torch.rand(args.tokens, K)
        times: dict[str, list[float]] = {f: [] for f in forms}
        with torch.no_grad():
            for i in range(args.pairs + 2):
                # Other experts at each turn, so that none is in a cache.
                for form, w in forms.items():
                    seconds = 0.0
                    for _ in range(8):
                        ids = torch.stack([torch.randperm(E)[:K] for _ in range(args.tokens)])
                        start = time.perf_counter()
                        experts_mlp(x, ids, routing, *w, impl="cpu")
                        seconds += (time.perf_counter() - start) / 8
                    if i >= 2:
                        times[form].append(seconds)
        base = statistics.median(times["bf16"])
        for form, w in forms.items():
            median = statistics.median(times[form])
            megabytes = sum(t.nbytes for t in w) / 1e6
            rate = args.tokens / median
            print(
                f"| {shape} | {form} | {megabytes:.0f} | {median * 1e6:.0f} | {rate:.0f} | {base / median:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
