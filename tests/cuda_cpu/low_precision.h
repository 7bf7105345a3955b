// __nv_bfloat16 and __half with CUDA's names: conversions rounded to nearest even, exact back.
#pragma once

struct __nv_bfloat16 {
    unsigned short bits;

    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {
        const unsigned u = __float_as_uint(x);
        const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
        bits = is_nan ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;  // a carry into the exponent is what rounding up means
    }
    operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};

struct __half {
    unsigned short bits;

    __half() = default;
    __half(float x) {
        const unsigned u = __float_as_uint(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffffu;
        unsigned rounded;
        if (magnitude > 0x7f800000u) {
            bits = 0x7fff;
            return;
        }
        if (magnitude >= 0x477ff000u) {  // 65520: half-way between the largest half and the next step
            rounded = 0x7c00;
        } else if (magnitude < 0x38800000u) {  // below 2^-14 halves are multiples of 2^-24, as floats are from 0.5 to 1
            rounded = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);
        } else {
            rounded = ((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10);  // the exponents' biases: 127 - 15
        }
        bits = sign | rounded;
    }
    operator float() const {
        const unsigned sign = unsigned(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
        if (exponent == 0) return __uint_as_float(sign | __float_as_uint(float(mantissa) * 0x1p-24f));
        if (exponent == 31) return __uint_as_float(mantissa ? 0x7fffffffu : sign | 0x7f800000u);
        return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    }
};

// Arithmetic rounds once, as the GPU's does: float has more than twice the digits plus two, so rounding twice is harmless.
#define EMU_ARITHMETIC(T)                                                    \
    inline T operator+(T a, T b) { return T(float(a) + float(b)); }          \
    inline T operator-(T a, T b) { return T(float(a) - float(b)); }          \
    inline T operator*(T a, T b) { return T(float(a) * float(b)); }          \
    inline T operator/(T a, T b) { return T(float(a) / float(b)); }          \
    inline T operator-(T a) { a.bits ^= 0x8000; return a; }                  \
    inline bool operator<(T a, T b) { return float(a) < float(b); }          \
    inline bool operator>(T a, T b) { return float(a) > float(b); }          \
    inline bool operator<=(T a, T b) { return float(a) <= float(b); }        \
    inline bool operator>=(T a, T b) { return float(a) >= float(b); }        \
    inline bool operator==(T a, T b) { return float(a) == float(b); }        \
    inline bool operator!=(T a, T b) { return float(a) != float(b); }
EMU_ARITHMETIC(__nv_bfloat16)
EMU_ARITHMETIC(__half)

struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct alignas(4) __half2 { __half x, y; };
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;
typedef __half half;
typedef __half2 half2;

inline float __bfloat162float(__nv_bfloat16 a) { return a; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 a) { return {a.x, a.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {x, x}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
inline float __low2float(__nv_bfloat162 a) { return a.x; }
inline float __high2float(__nv_bfloat162 a) { return a.y; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { __nv_bfloat16 a; a.bits = bits; return a; }

inline float __half2float(__half a) { return a; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float2 __half22float2(__half2 a) { return {a.x, a.y}; }
inline __half2 __float22half2_rn(float2 a) { return {a.x, a.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float2half2_rn(float x) { return {x, x}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }
inline float __low2float(__half2 a) { return a.x; }
inline float __high2float(__half2 a) { return a.y; }
inline unsigned short __half_as_ushort(__half a) { return a.bits; }
inline __half __ushort_as_half(unsigned short bits) { __half a; a.bits = bits; return a; }
