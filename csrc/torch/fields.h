// A convolution's problem as names and values: what Python is told of it, and what names it.
#pragma once

#include "core/conv2d_problem.h"

namespace fastconv {

// visit(name, value) for each field, in the order of fastconv/triton_kernels/problem.py.
template <class Visitor>
void visit_fields(const Conv2dProblem& p, Visitor& visit) {
  visit("N", p.N);
  visit("C", p.C);
  visit("H", p.H);
  visit("W", p.W);
  visit("K", p.K);
  visit("R", p.R);
  visit("S", p.S);
  visit("stride_h", p.stride_h);
  visit("stride_w", p.stride_w);
  visit("pad_h", p.pad_h);
  visit("pad_w", p.pad_w);
  visit("dil_h", p.dil_h);
  visit("dil_w", p.dil_w);
  visit("G", p.G);
  visit("dtype", name_of(p.dtype));
  visit("layout", name_of(p.layout));
  visit("filter_layout", name_of(p.filter_layout));
  visit("tf32", p.tf32);
  visit("scale", p.epilogue.scale);
  visit("shift", p.epilogue.shift);
  visit("residual", p.epilogue.residual);
  visit("activation", name_of(p.epilogue.activation));
  visit("slope", p.epilogue.slope);
  visit("statistics", p.epilogue.statistics);
}

}  // namespace fastconv
