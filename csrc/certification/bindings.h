// What Python sees of sequential certification: bounds, boundary tables, rules and the planner.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "certification/planner.h"

namespace pacd {

namespace py = pybind11;
using Integers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

inline py::array_t<int64_t> as_array(const std::vector<int64_t>& values) {
  return py::array_t<int64_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

inline double betting_bound(int64_t hits, int64_t samples, double alpha, int64_t prior_hits, int64_t prior_samples, bool upper) {
  const BettingPrior prior{prior_hits, prior_samples};
  const double bound = upper ? betting_upper(hits, samples, alpha, prior) : betting_lower(hits, samples, alpha, prior);
  if (std::isnan(bound))
    throw py::value_error("hits must be in [0, samples], samples below 2^31, likewise the prior's, and alpha in [1e-200, 1 - 2^-20]");
  return bound;
}

inline py::tuple sequential_boundaries(const std::vector<int64_t>& looks, double alpha, double p, double beta) {
  if (!(p > 0.0 && p < 1.0)) throw py::value_error("p must be in (0, 1)");
  std::vector<int64_t> accept = acceptance_boundary(looks, alpha, Dd(p), two_sum(1.0, -p));
  std::vector<int64_t> give_up = give_up_boundary(looks, accept.back(), beta);
  for (size_t k = 0; k < looks.size(); ++k) {
    accept[k] = looks[k] - accept[k];
    give_up[k] = looks[k] - give_up[k];
  }
  return py::make_tuple(as_array(accept), as_array(give_up));
}

// The outcomes of images whose votes are all there: what the planner would find, whatever its batches.
inline py::dict decide(const Rule& rule, const Integers& selection, const Integers& votes, const std::optional<Integers>& voids) {
  const int64_t looks = static_cast<int64_t>(rule.looks().size());
  if (selection.ndim() != 2 || votes.ndim() != 3 || votes.shape(0) != selection.shape(0) || votes.shape(1) != looks ||
      votes.shape(2) != selection.shape(1) || selection.shape(1) < 1)
    throw py::value_error("selection must be [N, classes] and votes [N, looks, classes], the votes between one look and the next");
  if (voids && (voids->ndim() != 2 || voids->shape(0) != selection.shape(0) || voids->shape(1) != looks))
    throw py::value_error("voids must be [N, looks]");
  const int64_t images = selection.shape(0), classes = selection.shape(1);
  py::array_t<int64_t> prediction(images), selected(images), samples(images), counted(images);
  py::array_t<double> radius(images), p_lower(images), rival_upper(images);
  int64_t* integers[] = {prediction.mutable_data(), selected.mutable_data(), samples.mutable_data(), counted.mutable_data()};
  double* reals[] = {radius.mutable_data(), p_lower.mutable_data(), rival_upper.mutable_data()};
  const int64_t *first = selection.data(), *all = votes.data(), *none = voids ? voids->data() : nullptr;
  {
    py::gil_scoped_release release;
    for (int64_t i = 0; i < images; ++i) {
      Progress image;
      rule.select(image, first + i * classes, classes);
      for (int64_t k = 0; k < looks; ++k) {
        const int64_t at = i * looks + k;
        if (rule.look(image, static_cast<size_t>(k), all + at * classes, none == nullptr ? 0 : none[at])) break;
      }
      const Outcome& outcome = image.outcome;
      integers[0][i] = outcome.prediction;
      integers[1][i] = outcome.selected;
      integers[2][i] = outcome.samples;
      integers[3][i] = outcome.counted;
      reals[0][i] = outcome.radius;
      reals[1][i] = outcome.p_lower;
      reals[2][i] = outcome.rival_upper;
    }
  }
  py::dict result;
  result["prediction"] = prediction;
  result["selected"] = selected;
  result["samples"] = samples;
  result["counted"] = counted;
  result["radius"] = radius;
  result["p_lower"] = p_lower;
  result["rival_upper"] = rival_upper;
  return result;
}

inline void bind_sequential(py::module_& m) {
  m.def("betting_lower", py::vectorize([](int64_t hits, int64_t samples, double alpha, int64_t prior_hits, int64_t prior_samples) {
          return betting_bound(hits, samples, alpha, prior_hits, prior_samples, false);
        }), py::arg("hits"), py::arg("samples"), py::arg("alpha"), py::arg("prior_hits") = 0, py::arg("prior_samples") = 0,
        "Lower bounds of a confidence sequence on a probability, float64, rounded down; arguments broadcast. The prior is what\n"
        "`prior_samples` earlier samples, none of them among `samples`, say; valid at every number of samples at once.");
  m.def("betting_upper", py::vectorize([](int64_t hits, int64_t samples, double alpha, int64_t prior_hits, int64_t prior_samples) {
          return betting_bound(hits, samples, alpha, prior_hits, prior_samples, true);
        }), py::arg("hits"), py::arg("samples"), py::arg("alpha"), py::arg("prior_hits") = 0, py::arg("prior_samples") = 0,
        "Upper bounds of a confidence sequence, rounded up; see betting_lower.");
  m.def("betting_reaches", [](int64_t hits, int64_t samples, double p, double alpha, int64_t prior_hits, int64_t prior_samples) {
          return betting_reaches(hits, samples, p, alpha, {prior_hits, prior_samples});
        }, py::arg("hits"), py::arg("samples"), py::arg("p"), py::arg("alpha"), py::arg("prior_hits") = 0, py::arg("prior_samples") = 0,
        "Whether the bets against the probability p have surely won 1 / alpha.");
  m.def("look_schedule", [](int64_t n, int64_t first) { return as_array(look_schedule(n, first)); }, py::arg("n"), py::arg("first") = 32, "The sample counts, int64 [K], at which sequential rules look; the last is n.");
  m.def("sequential_boundaries", &sequential_boundaries, py::arg("looks"), py::arg("alpha"), py::arg("p"), py::arg("beta") = 0.05,
        "(accept, give_up), int64 [K] each: with at least accept[k] hits look k accepts \"the probability is above p\", wrong\n"
        "with probability at most alpha over all looks; with at most give_up[k] hits it gives up, which at most a share beta\n"
        "of the runs that the last look would accept do. accept[k] is looks[k] + 1 where no look can accept yet.");
  m.def("give_up_boundary", [](const std::vector<int64_t>& looks, int64_t most, double beta) {
          return as_array(give_up_boundary(looks, most, beta));
        }, py::arg("looks"), py::arg("most"), py::arg("beta"),
        "The fewest misses at each look, int64 [K], that give up on at most `most` misses at the end: with probability at\n"
        "most beta a run that would end so is given up at any look.");
  m.def("radius_target", &radius_target, py::arg("sigma"), py::arg("radius"),
        "The smallest double p >= 1/2 whose radius sigma * Phi^-1(p), rounded down, is at least `radius`; 1 if there is none.");
  m.def("two_sided_radius", py::vectorize([](double sigma, double p_lower, double q_upper) {
          return two_sided_radius(sigma, p_lower, q_upper);
        }), py::arg("sigma"), py::arg("p_lower"), py::arg("q_upper"),
        "sigma / 2 (Phi^-1(p_lower) - Phi^-1(min(q_upper, 1 - p_lower))), rounded down, 0 where there is no lead; broadcasts.");

  py::class_<Outcome>(m, "Outcome", "What an image ends with; counts are the votes of its first `counted` estimation samples.")
      .def_readonly("prediction", &Outcome::prediction, "The class, -1 where it abstains.")
      .def_readonly("selected", &Outcome::selected)
      .def_readonly("radius", &Outcome::radius)
      .def_readonly("p_lower", &Outcome::p_lower)
      .def_readonly("rival_upper", &Outcome::rival_upper)
      .def_readonly("samples", &Outcome::samples, "Estimation samples that the decision looked at.")
      .def_readonly("counted", &Outcome::counted)
      .def_readonly("voids", &Outcome::voids, "Void ones among the counted.")
      .def_property_readonly("selection", [](const Outcome& outcome) { return as_array(outcome.selection); })
      .def_property_readonly("counts", [](const Outcome& outcome) { return as_array(outcome.counts); });
  py::class_<Rule, std::shared_ptr<Rule>>(m, "Rule", "When an image is decided: a pure function of its votes up to each look.")
      .def_property_readonly("n0", &Rule::n0, "Selection samples an image.")
      .def_property_readonly("n", &Rule::n, "The most estimation samples an image.")
      .def_property_readonly("looks", [](const Rule& rule) { return as_array(rule.looks()); }, "The sample counts that are looked at.")
      .def("decide", &decide, py::arg("selection"), py::arg("votes"), py::arg("voids") = std::nullopt,
           "Outcomes, a dict of arrays [N], from selection votes [N, classes] and votes between looks [N, looks, classes].")
      .def("issue", [](const Rule& rule, const Integers& selection, const Integers& counts, int64_t voids) {
             if (selection.ndim() != 1 || counts.ndim() != 1 || counts.size() != selection.size() || counts.size() < 1)
               throw py::value_error("selection and counts must be [classes]");
             return rule.issue(selection.data(), counts.data(), voids, counts.size());
           }, py::arg("selection"), py::arg("counts"), py::arg("voids") = 0,
           "The Outcome that the counts of a look alone support: what an honest certificate with these counts says.");
  py::class_<FullCertificates, Rule, std::shared_ptr<FullCertificates>>(m, "FullCertificates", "All n samples; hopeless images stop early.")
      .def(py::init<int64_t, int64_t, double, double, int, double>(), py::arg("n0"), py::arg("n"), py::arg("alpha"), py::arg("sigma"),
           py::arg("sides") = 1, py::arg("futility") = 1e-6);
  py::class_<SequentialRadii, Rule, std::shared_ptr<SequentialRadii>>(
      m, "SequentialRadii", "The largest of `radii` that is certified; without radii, the radius within `tolerance`.")
      .def(py::init([](int64_t n0, int64_t n, double alpha, double sigma, std::vector<double> radii, double tolerance, int sides) {
             py::gil_scoped_release release;
             return std::make_shared<SequentialRadii>(n0, n, alpha, sigma, std::move(radii), tolerance, sides);
           }), py::arg("n0"), py::arg("n"), py::arg("alpha"), py::arg("sigma"), py::arg("radii") = std::vector<double>{},
           py::arg("tolerance") = 0.0, py::arg("sides") = 1)
      .def("tables", [](const SequentialRadii& rule, bool rival) {
             const Tests& tests = rule.tests(rival);
             const int64_t looks = static_cast<int64_t>(rule.looks().size());
             py::array_t<int64_t> accept({looks, tests.size()}), give_up({looks, tests.size()});
             for (int64_t k = 0; k < looks; ++k) {
               for (int64_t i = 0; i < tests.size(); ++i) {
                 accept.mutable_at(k, i) = tests.accept(static_cast<size_t>(k), i);
                 give_up.mutable_at(k, i) = tests.give_up(static_cast<size_t>(k), i);
               }
             }
             const std::vector<double>& claims = rule.claims(rival);
             return py::make_tuple(py::array_t<double>(static_cast<py::ssize_t>(claims.size()), claims.data()), accept, give_up);
           }, py::arg("rival") = false,
           "(claims [J], accept [K, J], give_up [K, J]): at look k claim j, \"A's probability is above claims[j]\" (the rival's\n"
           "below), is accepted with at most accept[k, j] misses (votes of the rival), given up with at least give_up[k, j].");
  py::class_<SequentialPredict, Rule, std::shared_ptr<SequentialPredict>>(m, "SequentialPredict", "The class, or -1 to abstain.")
      .def(py::init<int64_t, int64_t, double, double>(), py::arg("n0"), py::arg("n"), py::arg("alpha"), py::arg("futility") = 1e-6);

  py::class_<SequentialPlanner>(m, "SequentialPlanner", "Which samples to draw next when images stop at different times.")
      .def(py::init([](std::shared_ptr<Rule> rule, std::vector<int64_t> ids, int64_t classes, const py::object& source) {
             std::function<int64_t()> next;
             if (!source.is_none()) next = [source] { return source().cast<int64_t>(); };
             return std::make_unique<SequentialPlanner>(std::move(rule), std::move(ids), classes, std::move(next));
           }), py::arg("rule"), py::arg("ids"), py::arg("classes"), py::arg("source") = py::none(),
           "source: called for each new image, the place of its id, or -1 where none is left; by default all in order.")
      .def("plan", [](SequentialPlanner& planner, int64_t rows) {
             const SequentialPlanner::Batch batch = planner.plan(rows);
             py::array_t<int64_t> pieces({static_cast<py::ssize_t>(batch.pieces.size()), py::ssize_t{5}});
             int64_t* out = pieces.mutable_data();
             for (const SequentialPlanner::Piece& piece : batch.pieces)
               for (const int64_t value : {piece.image, piece.stream, piece.first, piece.count, piece.slot}) *out++ = value;
             return py::make_tuple(pieces, as_array(batch.complete));
           }, py::arg("rows"),
           "(pieces int64 [m, 5] of (image, stream, first sample, count, slot), int64 slots that are complete after them): at\n"
           "most `rows` samples. Copy and zero the complete slots behind the batch, and report every plan later, in order, also\n"
           "one without pieces; without pieces, nothing new will come before a report.")
      .def("report", [](SequentialPlanner& planner, const Integers& votes, const std::optional<Integers>& voids) {
             if (votes.ndim() != 2 || votes.shape(1) != planner.classes()) throw py::value_error("votes must be [slots, classes]");
             if (voids && (voids->ndim() != 1 || voids->shape(0) != votes.shape(0))) throw py::value_error("voids must be [slots]");
             planner.report(votes.data(), voids ? voids->data() : nullptr, votes.shape(0));
           }, py::arg("votes"), py::arg("voids") = std::nullopt,
           "The votes int64 [slots, classes] of the oldest plan not yet reported, a row for each slot that it completed, and how\n"
           "many samples of each were void [slots]. Samples without a vote (NaN or infinite logits) are a failure.")
      .def_property_readonly("failure", &SequentialPlanner::failure,
           "What went wrong with the first image that has samples without a vote, or \"\": no image is started after it.")
      .def("finished", &SequentialPlanner::finished, "[(image, Outcome)] decided since the last call.")
      .def_property_readonly("done", &SequentialPlanner::done)
      .def_property_readonly("in_flight", &SequentialPlanner::in_flight, "Images that are started and not decided.")
      .def_property_readonly("unreported", &SequentialPlanner::unreported, "Plans that wait for report().")
      .def_property_readonly("drawn", &SequentialPlanner::drawn, "Samples planned so far, those in vain included.");
}

}  // namespace pacd
