// The whole batch as one graph: the first segment of the network, then for each later one a SWITCH node with one body
// per bucket size.
//
//   first segment -> switch of the second {bucket 0 | bucket 1 | ...} -> switch of the third {...} -> ...
//
// The gate at the end of a segment sets the switch of the next. A switch that nothing sets runs no body, so a batch
// whose samples have all left skips the rest. What messages call a segment is the caller's: it may span several stages.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "driver.h"

namespace dgate_rt::graph {

// What was captured at one size, and what messages call it: "stages 1 to 2, bucket 64".
struct Capture {
  Graph graph;
  int64_t bucket;
  std::string name;
};

// What runs behind a switch, and what messages call it: "stages 1 to 2".
struct Segment {
  std::string name;
  std::vector<Capture> buckets;
};

class AssembledGraph {
 public:
  // Copies the captures into one graph, instantiates and uploads it. What they use of memory must outlive this object.
  AssembledGraph(const Driver& driver, Stream stream, const Capture& first, const std::vector<Segment>& later);

  void launch(Stream stream) const;  // returns at once
  void destroy();                    // as the destructor, which tells nobody of a failure
  const std::vector<Switch>& switches() const { return switches_; }  // in the order of the chain

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
    int64_t bucket;
    Graph graph;
  };
  struct Link {  // the first has neither a switch nor bodies
    Node node;
    std::string name;
    Switch handle;
    std::vector<Body> bodies;
  };

  void add_switch(Context context, const Segment& segment);
  std::vector<std::pair<size_t, size_t>> edges() const;
  std::string json() const;
  std::string dot() const;

  const Driver& driver_;
  Owned<Graph> graph_;
  Owned<Exec> exec_;  // behind the graph, so that it goes first
  std::vector<Link> chain_;
  std::vector<Switch> switches_;
};

}  // namespace dgate_rt::graph
