// Functions that spdtool_sparse_cpu/products.py calls through ctypes, which has checked every argument. Exceptions become a
// text that says what went wrong; null means success.
#include "pool.hpp"
#include "training.hpp"

#if defined(_WIN32)
#define SPARSE_EXPORT extern "C" __declspec(dllexport)
#else
#define SPARSE_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

template <class Work>
const char* guarded(Work&& work) {
  try {
    work();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return "out of memory";
  } catch (...) {
    return "unknown error";
  }
}

}  // namespace

using sparse_cpu::best_kernels;
using sparse_cpu::Pool;
using sparse_cpu::TrainingProducts;

SPARSE_EXPORT const char* spdtool_products_new(const uint8_t* dead, uint32_t rows, uint32_t columns, TrainingProducts** made) {
  return guarded([&] { *made = new TrainingProducts(dead, rows, columns); });
}

SPARSE_EXPORT void spdtool_products_free(TrainingProducts* products) { delete products; }

SPARSE_EXPORT size_t spdtool_products_tile_size(const TrainingProducts* products, size_t n) {
  return products->tile_size(n, best_kernels());
}

SPARSE_EXPORT const char* spdtool_products_forward(const TrainingProducts* products, size_t threads, const float* weight,
                                                   const float* bias, const float* x, size_t n, float* tiles, float* y) {
  return guarded([&] { products->forward(weight, bias, x, n, tiles, y, best_kernels(), Pool(threads), threads); });
}

SPARSE_EXPORT const char* spdtool_products_backward(const TrainingProducts* products, size_t threads, const float* weight,
                                                    const float* dy, size_t n, const float* tiles, float* dx,
                                                    float* dweight) {
  return guarded([&] { products->backward(weight, dy, n, tiles, dx, dweight, best_kernels(), Pool(threads), threads); });
}
