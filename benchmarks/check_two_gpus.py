"""Hold several GPUs against one: windows and sequences shared over NCCL, layers spread, heads
split.

    python benchmarks/check_two_gpus.py --output two-gpus.json

Each check prints PASS or FAIL with what was measured; exit code 1 where one fails. `--gpus 0` runs
the same over gloo on a CPU, where a model cannot be spread. Groups of checks run at the same time.
One JSON object in the output.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from bench_quality import commit, machine
from safetensors.torch import load_file

from kvqtool.errors import KvqError

sys.path.append(str(Path(__file__).parents[1] / "tests"))

SPEC: Final = "nuq3-1%-sink1"
SPREAD: Final = "nuq4-1%-sink1"
TOKENS: Final = 40
LIMIT: Final = 150  # seconds for one command
# What may differ: levels are fp16 after sums in another order; scores are means over windows, which
# processes run in the batches of one; float16 logits of heads summed apart.
LEVELS, SCORES = 1e-3, 1e-6
# A spread model's states may differ in their last bits where GPUs do, and so a code here and there.
SPREAD_SCORES: Final = 1e-4
# Of 512 tokens: more than one batch of a GPU, so that each process has one. Where there are fewer
# than processes, batches are cut, states differ in their last bits, and some codes with them: then
# a perplexity may change by a share of what quantization costs, which is its divergence's root.
WINDOWS, FEW, SHARE = 40, 8, 0.02
BOUNDS: Final = {"float32": 1e-4, "float16": 0.02}
# Scales in pages are float16. States of a shared sequence differ in their last bits, and some codes
# may fall the other side of a middle: no further from exact logits than one process is.
PAGES, FURTHER = 0.02, 1.1
WORKER: Final = Path(__file__).with_name("split_worker.py")
CONTEXT_WORKER: Final = Path(__file__).with_name("context_worker.py")


@dataclass
class Checks:
    """What has been checked so far.

    Args:
        folder: for files between commands.
        gpus: how many are shared by; 0 for a CPU.
        rows: a row per check.
    """

    folder: Path
    gpus: int
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def processes(self) -> int:
        """How many share the work."""
        return self.gpus or 2

    def check(self, name: str, measure: Callable[[], tuple[bool, str]]) -> None:
        """Run one check and print its line; what it raises is a failure."""
        started = time.perf_counter()
        try:
            is_met, said = measure()
        except (KvqError, RuntimeError, subprocess.TimeoutExpired, OSError, KeyError) as error:
            is_met, said = False, f"{type(error).__name__}: {error}"
        seconds = round(time.perf_counter() - started, 1)
        self.rows.append({"check": name, "passed": is_met, "found": said, "seconds": seconds})
        print(f"{'PASS' if is_met else 'FAIL'}  {name}: {said}  ({seconds} s)", flush=True)

    def kvqtool(self, *words: object, shared: bool = False) -> dict[str, Any]:
        """Run a command, alone on the first GPU or shared by all; return its JSON result."""
        launch = self.torchrun() if shared else [sys.executable]
        device = ["--device", "cuda" if shared else "cuda:0"] if self.gpus else ["--device", "cpu"]
        device = [] if "--device-map" in words else device
        command = [*launch, "-m", "kvqtool", *map(str, words), *device, "--json", "--force"]
        command = [word for word in command if word != "--force" or "-o" in words]
        result: dict[str, Any] = json.loads(self.run(command))["result"]
        return result

    def torchrun(self) -> list[str]:
        """Return what starts the processes."""
        module = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*module, "--nproc-per-node", str(self.processes)]

    def run(self, command: list[str]) -> str:
        """Run a command and return its stdout.

        Raises:
            RuntimeError: when it fails; the end of its stderr.
        """
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
        if done.returncode:
            raise RuntimeError(" / ".join(done.stderr.strip().splitlines()[-4:]))
        return done.stdout


def main() -> None:
    """Check and print."""
    from deep_model import write_deep

    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        checks = Checks(Path(folder), options.gpus)
        deep = write_deep(checks.folder / "deep")
        groups = {
            "windows": [partial(_shared_windows, checks)],
            "heads": [partial(_split, checks, *each) for each in BOUNDS.items()],
            "context": [partial(_context, checks)],
            "spread": [partial(_spread, checks, model) for model in ("builtin", str(deep))],
        }
        chosen = options.only or [name for name in groups if options.gpus or name != "spread"]
        with ThreadPoolExecutor(options.at_once) as pool:
            for group in [pool.submit(group) for name in chosen for group in groups[name]]:
                group.result()
    record = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "commit": options.commit or commit(),
        "date": time.strftime("%Y-%m-%d"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(options.gpus)],
        "checks": checks.rows,
    }
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    failed = sum(not row["passed"] for row in checks.rows)
    print(f"{len(checks.rows) - failed} of {len(checks.rows)} passed")
    sys.exit(1 if failed else 0)


def _shared_windows(checks: Checks) -> None:
    """Calibrate and evaluate with one process and with several."""
    one, several = (checks.folder / f"{name}.safetensors" for name in ("one", "several"))
    learn = ("calibrate", "builtin", "--spec", SPEC, "--samples", 8, "--seq-len", 512)
    learn = (*learn, "--dtype", "float32")
    score = ("ppl", "builtin", "--bundle", one, "--seq-len", 512, "--dtype", "float32")

    def bundles() -> tuple[bool, str]:
        checks.kvqtool(*learn, "-o", one)
        checks.kvqtool(*learn, "-o", several, shared=True)
        differing, worst = compare(load_file(one), load_file(several))
        return worst <= LEVELS, f"{differing} numbers differ, by {worst:.1e} of a tensor's largest"

    def scores(windows: int) -> tuple[bool, str]:
        asked = (*score, "--windows", windows)
        alone, shared = checks.kvqtool(*asked), checks.kvqtool(*asked, shared=True)
        names = "ppl", "ppl_baseline", "kld_mean"
        apart = {n: abs(shared[n] / alone[n] - 1) for n in names}
        said = ", ".join(f"{n} {alone[n]:.6f} and {shared[n]:.6f}" for n in names)
        bound = SCORES if windows > FEW else SHARE * math.sqrt(alone["kld_mean"])
        is_met = max(apart["ppl"], apart["ppl_baseline"]) <= bound
        return is_met, f"{said}, apart by {max(apart.values()):.1e}, bound {bound:.1e}"

    backend = "NCCL" if checks.gpus else "gloo"
    checks.check(f"calibrate {SPEC} over {backend}", bundles)
    for windows in (WINDOWS, FEW) if checks.gpus else (FEW,):
        name = f"ppl {SPEC}, {windows} windows over {backend}"
        checks.check(name, partial(scores, windows))


def _spread(checks: Checks, model: str) -> None:
    """Run a model on one GPU and spread over all, through torch and through the kernels."""
    name, spec = Path(model).name, ("--spec", SPREAD, "--calibration-samples", 4)
    score = ("ppl", model, *spec, "--calibration-seq-len", 256, "--windows", 4, "--seq-len", 256)
    write = ("generate", model, *spec, "--calibration-seq-len", 256, "--dtype", "float16")
    write = (*write, "--prompt", "A list is a sequence. " * 40, "--max-new-tokens", TOKENS)

    def scores() -> tuple[bool, str]:
        exact = (*score, "--dtype", "float32")
        alone, spread = checks.kvqtool(*exact), checks.kvqtool(*exact, "--device-map", "auto")
        apart = max(abs(spread[n] / alone[n] - 1) for n in ("ppl", "ppl_baseline"))
        return apart <= SPREAD_SCORES, f"perplexity apart by {apart:.1e}"

    def tokens() -> tuple[bool, str]:
        alone = checks.kvqtool(*write, "--decode", "eager")
        spread = checks.kvqtool(*write, "--device-map", "auto")
        ours, theirs = alone["token_ids"], spread["token_ids"]
        pairs = enumerate(zip(ours, theirs, strict=False))
        same = next((i for i, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
        kernel = spread["kernel"]
        said = f"{same} of {TOKENS} tokens alike, read by {kernel} and {alone['kernel']}"
        return same == TOKENS and kernel == alone["kernel"] == "cuda (fused)", said

    checks.check(f"{name} lies on several GPUs, --device-map auto", lambda: is_spread(model))
    checks.check(f"ppl {name}, --device-map auto", scores)
    checks.check(f"generate {name}, --device-map auto, float16", tokens)


def _split(checks: Checks, dtype: str, bound: float) -> None:
    """Split the built-in model by head and compare its logits with those of the whole one."""

    def logits() -> tuple[bool, str]:
        report = checks.folder / f"split-{dtype}.json"
        at = ("--dtype", dtype, "--device", "cuda" if checks.gpus else "cpu")
        checks.run([*checks.torchrun(), str(WORKER), str(report), *at])
        found = json.loads(report.read_text(encoding="utf-8"))
        apart = ", ".join(f"{name} {error:.1e}" for name, error in found["errors"].items())
        heads = found["kv_heads"]
        said = f"{heads} KV heads each, logits apart by {apart}, read by {found['kernel']}"
        exact, packed = found["errors"].values()
        is_met = exact <= bound and packed <= PAGES and heads == 2 // checks.processes
        return is_met, said

    checks.check(f"heads split by tp_plan, {dtype}", logits)


def _context(checks: Checks) -> None:
    """Share one sequence of the built-in model by its tokens."""

    def logits() -> tuple[bool, str]:
        report, dtype = checks.folder / "context.json", "float16" if checks.gpus else "float32"
        at = ("--dtype", dtype, "--device", "cuda" if checks.gpus else "cpu")
        checks.run([*checks.torchrun(), str(CONTEXT_WORKER), str(report), *at])
        found = json.loads(report.read_text(encoding="utf-8"))
        apart = "; ".join(
            f"{name}: logits apart by {e['apart']:.1e}, from exact ones by {e['shared']:.2e}, "
            f"{e['alone']:.2e} alone"
            for name, e in found["errors"].items()
        )
        said = (
            f"{found['packed']} tokens; {apart}; bits alike everywhere {found['same_bits']}, "
            f"codes {found['same_codes']}, read by {found['kernel']}"
        )
        is_near = all(
            max(e["apart"], e["shared"] / FURTHER) < e["alone"] for e in found["errors"].values()
        )
        is_read_alike = found["kernel"] == found["alone"]
        return is_near and is_read_alike and found["same_bits"] and found["same_codes"], said

    backend = "NCCL" if checks.gpus else "gloo"
    checks.check(f"one sequence shared over {backend}, {SPEC}", logits)


def compare(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> tuple[int, float]:
    """Return how many numbers of two bundles differ, and the greatest difference over the greatest
    number of its tensor.

    Raises:
        KeyError: when they do not hold the same tensors.
    """
    if expected.keys() != found.keys():
        raise KeyError(f"tensors {sorted(expected.keys() ^ found.keys())} are in one bundle only")
    differing, worst = 0, 0.0
    for name, tensor in expected.items():
        apart = (found[name].double() - tensor.double()).abs()
        differing += int((apart > 0).sum())
        worst = max(worst, float(apart.max() / tensor.double().abs().max().clamp_min(1e-30)))
    return differing, worst


def is_spread(model: str) -> tuple[bool, str]:
    """Tell whether a model has come to lie on more than one GPU."""
    from kvqtool.models import load_model

    loaded = load_model(model, device_map="auto")
    model_layers = [str(next(layer.parameters()).device) for layer in loaded.model.model.layers]
    places = [str(loaded.device), *model_layers]
    return len(set(places)) > 1, f"embeddings and layers: {', '.join(places)}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    kinds = ("windows", "heads", "context", "spread")
    parser.add_argument("--only", nargs="*", choices=kinds, help="checks of these kinds")
    parser.add_argument("--at-once", type=int, default=5, help="groups of checks")
    parser.add_argument("--commit", help="for checkouts without git")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
