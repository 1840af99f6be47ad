// The activations of the two feed-forwards, and the numbers that the two forms of GELU need
// on any device.

#pragma once

namespace adatape {

// kGeluTanh, kGelu and kRelu are those of the feed-forward for input rows, and kGlu is that of the
// feed-forward for tape rows.
enum class Activation { kGeluTanh, kGelu, kRelu, kGlu };

// The exact GELU of x is max(x, 0) - |x| · Q(|x|), where Q(x) is the probability that a standard
// normal variable exceeds x. With s = 1 / (1 + kTailPlace · x), for x from 0 on,
//
//     Q(x) = exp(-x² / 2) · s · (kTail0 + kTail1 · s + … + kTail8 · s⁸)
//
// is right within 3e-8 of its value.
constexpr float kTailPlace = 0.26f;
constexpr float kTail0 = 0.10376126f, kTail1 = 0.10298022f, kTail2 = 0.10328538f;
constexpr float kTail3 = 0.050047074f, kTail4 = 0.16322021f, kTail5 = -0.15420616f;
constexpr float kTail6 = 0.25431764f, kTail7 = -0.1541892f, kTail8 = 0.030783568f;
// From here on exp(-x² / 2), and with it Q(x), is 0 in float, which spares products of infinity
// and 0.
constexpr float kTailEnd = 20.0f;
// From here on the gate of GELU's tanh form is 1 in float, and that of the negative number is 0;
// the slope's other addend is 0 on both sides.
constexpr float kGateEnd = 20.0f;
constexpr float kNormalDensity = 0.39894228f;  // the density of a standard normal variable at 0

}  // namespace adatape
