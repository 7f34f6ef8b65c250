// The whole batch as one graph: stage 0, then for each later stage a SWITCH node with one body per bucket size.
//
//   stage 0 -> switch of stage 1 {bucket 0 | bucket 1 | ...} -> switch of stage 2 {...} -> ...
//
// The gate at the end of a stage sets the switch of the next. A switch that nothing sets runs no body, so a batch whose
// samples have all left skips the rest.
#pragma once

#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "driver.h"

namespace dgate_rt::graph {

// What was captured of one stage at one size, and what messages call it: "stage 2, bucket 64".
struct Capture {
  Graph graph;
  std::string name;
};

class AssembledGraph {
 public:
  // Copies the captures into one graph, instantiates and uploads it. What they use of memory must outlive this object.
  AssembledGraph(const Driver& driver, Stream stream, const Capture& first,
                 const std::vector<std::vector<Capture>>& later);

  void launch(Stream stream) const;  // returns at once
  void destroy();                    // as the destructor, which tells nobody of a failure
  const std::vector<Switch>& switches() const { return switches_; }  // of stage 1, 2, ...

  std::string describe(const std::string& format) const;  // "json" or "dot"

 private:
  struct Destroy {
    const Driver* driver;
    void operator()(Graph graph) const { driver->destroy(graph); }
    void operator()(Exec exec) const { driver->destroy_exec(exec); }
  };
  template <class Pointer>
  using Owned = std::unique_ptr<std::remove_pointer_t<Pointer>, Destroy>;

  struct Body {
    std::string name;
    Graph graph;
  };
  struct Stage {  // stage 0 has neither a switch nor bodies
    Node node;
    std::string name;
    Switch handle;
    std::vector<Body> bodies;
  };

  void add_switch(Context context, const std::vector<Capture>& buckets);
  std::vector<std::pair<size_t, size_t>> edges() const;
  std::string json() const;
  std::string dot() const;

  const Driver& driver_;
  Owned<Graph> graph_;
  Owned<Exec> exec_;  // behind the graph, so that it goes first
  std::vector<Stage> stages_;
  std::vector<Switch> switches_;
};

}  // namespace dgate_rt::graph
