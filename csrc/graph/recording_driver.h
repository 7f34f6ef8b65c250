// A driver with no GPU behind it: it holds graphs to CUDA's rules, runs them on the host and counts what was asked of
// it.
//
// A captured graph is a list of nodes that nothing looks into but the rules, and a callback that does the stage's work.
// Objects are numbers that are never given out twice, so what is used after its end is known as such. Where CUDA leaves
// behaviour undefined, or waits and sees, this driver refuses.
#pragma once

#include <string>
#include <vector>

#include "driver.h"

namespace dgate_rt::graph {

const Driver& recording_driver();

// A captured graph with these nodes: names of NodeType with commas between, "child graph(kernel, host call)" for one
// that holds others, "kernel@2" for one of the simulated context 2; the current context is 1. Running it calls
// `callback`, whose answer is 0 unless it failed.
Graph simulate_capture(int (*callback)(), const std::string& nodes);

// Ends a captured graph and the memory that it uses: what was copied from it must not run any more.
void release_capture(Graph capture);

// Why a stage that runs now may not set a switch, or nothing.
std::string why_not_set(Switch handle);

// What cudaGraphSetConditional does in a kernel; throws a std::runtime_error where why_not_set has an answer.
void set_switch(Switch handle, uint32_t value);

struct Counts {
  int64_t launches;          // of graphs
  int64_t stages;            // captured graphs that ran
  int64_t conditionals;      // switches that were looked at
  int64_t host_calls;        // into the driver
  int64_t synchronisations;  // always 0: the table has no call that waits
  int64_t allocations;       // graphs, nodes, switches and instantiations that were made
  int64_t live;              // of these, without nodes, and not counting captured graphs
  int64_t live_captures;
};
Counts counts();
void reset_counts();  // but for what lives

// The version that the driver claims to have; and after how many calls one is refused for want of memory, -1: never.
void set_version(int version);
void fail_after(int64_t calls);

// One of the table's calls, cudaGraphSetConditional, set_version or fail_after, by name; sim_call.cpp has the
// arguments.
std::vector<int64_t> sim_call(std::string call, std::vector<int64_t> arguments);

}  // namespace dgate_rt::graph
