"""The process of one quantizer of `quantize.py`: makes one model, and says what that took.

    quantize_worker.py REQUEST

REQUEST is JSON: `quantizer` (`lwc`, or a key of `quantize_peers.QUANTIZERS`), `base` and `target`
(ONNX files), `feeds` (a folder of `.npz` files) and `options`. It prints `{"seconds", "peak"}`:
from importing the quantizer to the file that is written, and the most bytes that were ever
resident, mapped files included. Where it fails, the last line it writes says why. Only `lwc`
imports lwc.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.quantize_judge import one_line
from bench.quantize_peers import QUANTIZERS


def _lwc(base: Path, target: Path, feeds: Path, passes: str) -> None:
    import lwc

    calibration = feeds if any(feeds.glob("*.npz")) else None
    lwc.optimize(base, passes, calibration=calibration, grant="all").save(target)


def main() -> None:
    request: dict[str, Any] = json.loads(sys.argv[1])
    # What quantizers print must not get into the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    base, target, feeds = (Path(request[name]) for name in ("base", "target", "feeds"))
    begun = time.perf_counter()
    try:
        if request["quantizer"] == "lwc":
            _lwc(base, target, feeds, **request["options"])
        else:
            quantizer = QUANTIZERS[request["quantizer"]]
            quantizer(base, target, sorted(feeds.glob("*.npz")), **request["options"])
    except Exception as error:  # whatever it is, the parent wants one line of it
        raise SystemExit("\n" + one_line(error)) from error
    seconds = time.perf_counter() - begun
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak": peak}), file=answer)


if __name__ == "__main__":
    main()
