"""Write a GGUF file in another block format, with llama.cpp's own conversion.

decode_convert.py SOURCE TARGET KIND

It runs in the environment that has llama-cpp-python.
"""

from __future__ import annotations

import sys

import llama_cpp

KINDS = {
    "f32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q3_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M,
}


def main() -> None:
    source, target, kind = sys.argv[1:]
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = KINDS[kind]
    options.allow_requantize = True  # from the blocks of the source to float32
    failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), options)
    if failed:
        raise SystemExit(f"llama_model_quantize returned {failed}")


if __name__ == "__main__":
    main()
