#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace sparsebreg {

extern const Table serial_table;
#if defined(__x86_64__)
extern const Table avx2_table;
extern const Table avx512_table;
#elif defined(__aarch64__)
extern const Table neon_table;
#endif

namespace {

std::vector<const Table*> usable() {
  std::vector<const Table*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    tables.push_back(&avx512_table);
  if (avx2) tables.push_back(&avx2_table);
#elif defined(__aarch64__)
  tables.push_back(&neon_table);
#endif
  tables.push_back(&serial_table);
  return tables;
}

const Table* find(const std::string& name) {
  std::string known;
  for (const Table* t : usable()) {
    if (name == t->isa) return t;
    known += (known.empty() ? "" : ", ") + std::string(t->isa);
  }
  throw std::invalid_argument("SPARSEBREG_ISA: expected one of " + known + " on this CPU, got '" + name + "'");
}

const Table* active = nullptr;

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Table* t : usable()) names.push_back(t->isa);
  return names;
}

const Table& active_table() {
  if (!active) {
    const char* wanted = std::getenv("SPARSEBREG_ISA");
    active = wanted && *wanted ? find(wanted) : usable().front();
  }
  return *active;
}

void select_isa(const std::string& name) { active = find(name); }

}  // namespace sparsebreg
