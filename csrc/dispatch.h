// Chooses the kernels for this CPU.
#pragma once

#include <string>
#include <vector>

#include "kernels/table.h"

namespace sparsebreg {

// Instruction sets that this build has and this CPU runs, best first; "serial" always stands last.
std::vector<std::string> available_isas();

// The table in use: the best one, or the one that SPARSEBREG_ISA names. Throws std::invalid_argument where that names
// one which is not available.
const Table& active_table();

// Switches tables; throws std::invalid_argument for an unavailable name. Not for use while a kernel runs.
void select_isa(const std::string& name);

}  // namespace sparsebreg
