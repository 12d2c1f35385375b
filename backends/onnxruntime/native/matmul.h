// A product of activations, rounded to 8 bits row by row, with packed codes of 2, 3, 4 or 8 bits.
//
// Codes are unsigned and lie in tiles of 16 columns, 32 inputs after another: with 8 bits
// [inputs / 4][16][4], with fewer bits so that a few shifts and masks of one 64-byte line give the
// lines of 8 bits. lwc/core/quant_layout.py writes this layout and says how it lies in full.

#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define LWC_X86
#endif

namespace lwc {

constexpr int kTile = 16;       // columns
constexpr int kStep = 32;       // inputs that are unpacked together
constexpr int64_t kSpan = 1 << 15;  // inputs whose products fit 32 bits: 255 * 127 * 2^15 < 2^31

enum class Activation { kNone, kSilu, kGelu, kGeluTanh, kRelu };

struct Options {
  int64_t inputs;      // K
  int64_t columns;     // N
  int64_t bits;
  int64_t block_size;  // 0: one block
  bool block_of_x;     // each block of a row of x has a scale of its own
  bool zero_points;
  bool bias;
  bool gated;
  Activation activation;

  int64_t tiles() const { return (columns + kTile - 1) / kTile; }
  int64_t depth() const { return (inputs + kStep - 1) / kStep * kStep; }
  int64_t blocks() const { return block_size ? (inputs + block_size - 1) / block_size : 1; }
  int64_t tile_bytes() const { return depth() * kTile * bits / 8; }
  int64_t width() const { return gated ? columns / 2 : columns; }
  // A sum of products is made over a span: a block, or what 32 bits hold of the only block.
  int64_t span() const { return block_size ? block_size : (depth() < kSpan ? depth() : kSpan); }
  int64_t spans() const { return (depth() + span() - 1) / span(); }
};

struct Weights {
  const uint8_t* codes;        // [tiles][tile_bytes]
  const void* scales;          // [tiles][blocks][16]
  bool half;                   // scales are float16
  const uint8_t* zero_points;  // [tiles][blocks][16], or null
  const float* bias;           // [columns], or null
};

struct Rows {
  int8_t* codes;    // [rows][depth]; what follows the inputs is zero
  float* scales;    // [rows][spans]
  int32_t* sums;    // [rows][spans]: of codes
};

struct Kernels {
  const char* name;
  // Rounds rows [begin, end) of x, [rows][inputs].
  void (*round_rows)(const Options&, const float* x, int64_t begin, int64_t end, Rows);
  // Computes rows [begin, end) of tiles [first, last); scratch has room for scratch_bytes.
  void (*multiply)(const Options&, const Weights&, Rows, int64_t begin, int64_t end, int64_t first,
                   int64_t last, uint8_t* scratch, float* y);
};

// Tiles that are unpacked together for many rows, and the bytes that takes.
constexpr int64_t kGroup = 2;
constexpr int64_t kFewRows = 3;  // up to so many, codes are unpacked as they are used

inline int64_t scratch_bytes(const Options& options) {
  return options.bits == 8 ? 0 : kGroup * options.depth() * kTile;
}

extern const Kernels kPlain;
#ifdef LWC_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512Vnni;
#endif

}  // namespace lwc
