#pragma once

#include <string>

namespace secondorder {

// Has autograd refuse to differentiate an operator, `name` or `name.overload`, in forward and in backward mode.
void refuse_derivatives(const std::string& name);

}  // namespace secondorder
