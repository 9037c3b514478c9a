// Whole encoders of each kind of layer, 6 x 384 with 90 % zeros, beside BERT's: interleaved rounds on one thread. Measured is
// the thread's own processor time, so that others may work on the machine meanwhile.
//
//   cmake -S plugins/spdtool-sparse-cpu -B build/products -DSPARSE_CPU_BENCHMARKS=ON
//   cmake --build build/products && build/products/cpp/benchmarks/kinds [ROUNDS [SECONDS]]
#include <cstdlib>
#include <ctime>

#include "../tests/slow_encoder.hpp"

using namespace slow;

namespace {

struct Timed {
  std::string name;
  std::unique_ptr<Encoder> encoder;
  std::vector<double> seconds;
};

Timed prepare(LayerKind kind, const char* name, Reads reads, const char* attention = "") {
  Config config{name, 384, 12, size_t(kind == LayerKind::kModernBert ? 576 : 1536), 6};  // as wide as ModernBERT's own
  config.kind = kind;
  config.attention = attention;
  config.window = 64;
  config.token_types = false;
  config.tables = config.values = Values::kFloat16;
  config.density = 0.1;
  config.positions = 1100;
  return {name, Model(config, 1).encoder(reads), {}};
}

double median(std::vector<double> numbers) {
  std::sort(numbers.begin(), numbers.end());
  return numbers[numbers.size() / 2];
}

double thread_seconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

double seconds_of(const Encoder& encoder, const Batch& batch, std::vector<float>& out) {
  Threads one;
  const double begun = thread_seconds();
  encoder.run(batch.tokens(), out.data(), one);
  return thread_seconds() - begun;
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 5;
  const double limit = count > 2 ? std::atof(arguments[2]) : 60;
  machine::cores = 1;
  std::vector<Timed> all;
  all.push_back(prepare(LayerKind::kBert, "BERT", Reads::kFirst));
  all.push_back(prepare(LayerKind::kMpnet, "MPNet", Reads::kFirst));
  all.push_back(prepare(LayerKind::kDeberta, "DeBERTa", Reads::kFirst));
  all.push_back(prepare(LayerKind::kModernBert, "ModernBERT", Reads::kFirst, "gllgll"));
  all.push_back(prepare(LayerKind::kModernBert, "ModernBERT, global", Reads::kFirst, "gggggg"));
  all.push_back(prepare(LayerKind::kBert, "BERT, mean", Reads::kMean));
  Chance chance(1);
  const auto begun = std::chrono::steady_clock::now();
  for (const auto& [rows, length] : {std::pair<size_t, size_t>{1, 32}, {1, 128}, {8, 128}, {1, 1024}}) {
    const Batch batch = make_batch(chance, rows, length, Mask::kFull, -1);
    std::vector<float> out(rows * length * 384);
    const int repeats = rows * length > 500 ? (rounds + 1) / 2 : 4 * rounds;  // of a long batch fewer are enough
    for (int round = -1; round < repeats; round++)
      for (Timed& timed : all) {
        const double seconds = seconds_of(*timed.encoder, batch, out);
        if (round >= 0) timed.seconds.push_back(seconds);  // the first one warms up
      }
    const double base = median(all[0].seconds);
    for (Timed& timed : all) {
      std::printf("%zu x %-5zu %-20s %8.2f ms  %.2f of BERT\n", rows, length, timed.name.c_str(),
                  median(timed.seconds) * 1e3, median(timed.seconds) / base);
      timed.seconds.clear();
    }
    std::fflush(stdout);
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count() > limit) break;
  }
}
