#include "failure.hpp"

#include <cstdarg>
#include <cstdio>
#include <new>

Failure::Failure(qd_status status, const char* format, ...) : status(status) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message.text, sizeof message.text, format, arguments);
  va_end(arguments);
}

int32_t status_of_exception(qd_message* why) noexcept {
  const auto report = [why](qd_status status, const char* text) {
    if (why) std::snprintf(why->text, sizeof why->text, "%s", text);
    return int32_t(status);
  };
  try {
    throw;
  } catch (const Failure& failure) {
    return report(failure.status, failure.what());
  } catch (const std::bad_alloc&) {
    return report(QD_STATUS_OUT_OF_MEMORY, "no memory is left for intermediate results");
  } catch (const std::exception& error) {
    return report(QD_STATUS_FAILED, error.what());
  } catch (...) {
    return report(QD_STATUS_FAILED, "an exception of an unknown kind");
  }
}
