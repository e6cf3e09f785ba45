// Structs that Python passes as a dictionary of their fields, {"x": address, "batch": 2, ...}: what both modules need
// for them. A name that is unknown or absent raises TypeError. A class of pybind11 would cost as much again as such a
// call.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <type_traits>

namespace kr {

namespace py = pybind11;

template <class T>
struct Field {
    PyObject* name;  // interned, so that two equal names are one object
    void (*set)(T&, PyObject*);
};

// Specialised by each such struct, with `type` and `list`, see KR_FIELDS.
template <class T>
struct Fields {};

template <class T>
T from_dict(PyObject* given);

// Python's value into a field: addresses (0 for null), numbers, codes of enums, and lists of them.
template <class T>
void assign(T*& to, PyObject* from) {
    to = reinterpret_cast<T*>(PyLong_AsUnsignedLongLong(from));
}
inline void assign(double& to, PyObject* from) { to = PyFloat_AsDouble(from); }
inline void assign(float& to, PyObject* from) { to = (float)PyFloat_AsDouble(from); }
inline void assign(bool& to, PyObject* from) { to = PyObject_IsTrue(from) == 1; }
inline void assign(uint64_t& to, PyObject* from) { to = PyLong_AsUnsignedLongLong(from); }
template <class T>
std::enable_if_t<std::is_integral<T>::value || std::is_enum<T>::value> assign(T& to, PyObject* from) {
    to = static_cast<T>(PyLong_AsLongLong(from));
}
template <class T, int N>
void assign(T (&to)[N], PyObject* from) {
    const Py_ssize_t count = PyList_Size(from);
    if (count > N) throw py::type_error("a list of at most " + std::to_string(N) + " must be given");
    for (Py_ssize_t i = 0; i < count; ++i) assign(to[i], PyList_GET_ITEM(from, i));
}

// KR_FIELDS(SolverStep, KR_FIELD(x), ...) in namespace kr.
#define KR_FIELDS(Type, ...)                                   \
    template <>                                                \
    struct Fields<Type> {                                      \
        using Struct = Type;                                   \
        static constexpr const char* type = #Type;             \
        static const auto& list() {                            \
            static const Field<Type> fields[] = {__VA_ARGS__}; \
            return fields;                                     \
        }                                                      \
    };
#define KR_FIELD(name) KR_FIELD_AS(name, name)
#define KR_FIELD_AS(name, member) \
    {PyUnicode_InternFromString(#name), [](Struct& to, PyObject* from) { assign(to.member, from); }}

// Callers mostly give the fields in the order of the list, so each search starts behind the last match.
template <class T>
T from_dict(PyObject* given) {
    const auto& fields = Fields<T>::list();
    constexpr int count = (int)std::extent<std::remove_reference_t<decltype(fields)>>::value;
    static_assert(count <= 64, "a bit for each field");
    const std::string type = Fields<T>::type;
    T out = {};
    uint64_t matched = 0;
    PyObject *key, *value;
    Py_ssize_t position = 0;
    for (int next = 0; PyDict_Next(given, &position, &key, &value); ++next) {
        int tried = 0;
        while (fields[next %= count].name != key) {
            if (++tried > count) throw py::type_error(type + " has no field " + py::cast<std::string>(py::handle(key)));
            ++next;
        }
        fields[next].set(out, value);
        matched |= (uint64_t)1 << next;
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    for (int i = 0; i < count; ++i)
        if (!(matched >> i & 1))
            throw py::type_error(type + " needs " + py::cast<std::string>(py::handle(fields[i].name)));
    return out;
}

}  // namespace kr

namespace pybind11 {
namespace detail {

template <class T>
struct type_caster<T, std::void_t<decltype(kr::Fields<T>::type)>> {
    PYBIND11_TYPE_CASTER(T, const_name("dict"));
    bool load(handle from, bool) {
        if (!PyDict_Check(from.ptr())) return false;
        value = kr::from_dict<T>(from.ptr());
        return true;
    }
};

}  // namespace detail
}  // namespace pybind11
