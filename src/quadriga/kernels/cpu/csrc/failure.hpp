// What goes wrong in the library, and how it leaves it: as a status and a message, never as an exception.
#pragma once
#include <exception>
#include <utility>

#include "quadriga.h"

// A failure with a status of its own; its message is for the person who runs the program.
struct Failure : std::exception {
  __attribute__((format(printf, 3, 4))) Failure(qd_status status, const char* format, ...);
  const char* what() const noexcept override { return message.text; }
  qd_status status;
  qd_message message;
};

// The exception that is being handled as a status; its reason goes into `why`, if there is one.
int32_t status_of_exception(qd_message* why) noexcept;

// Every exported function's body runs in here.
template <class Body>
int32_t guarded(qd_message* why, Body&& body) noexcept {
  try {
    body();
    return QD_STATUS_OK;
  } catch (...) {
    return status_of_exception(why);
  }
}
