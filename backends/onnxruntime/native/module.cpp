// One shared object as two things: a library of custom operators, and a Python module that tells
// where it lies (its __file__) and which instruction set it chose.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>

#include "operator.h"

#if defined(_WIN32)
#define LWC_EXPORT extern "C" __declspec(dllexport)
#else
#define LWC_EXPORT extern "C" __attribute__((visibility("default")))
#endif

LWC_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  const ort::Api* const api = base->GetApi(ort::kApiVersion);
  if (api) return lwc::register_operators(options, api);
  const ort::Api* const first = base->GetApi(1);
  return ort::create_status(first, "lwc's native operators need ONNX Runtime 1.17 or newer");
}

namespace {

PyObject* instruction_set(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(lwc::kernels().name);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "Return the instruction set of the kernels."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native",
                          "Native operators of lwc for ONNX Runtime.", -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
