// What operating systems and processors differ in: sleeping until a word changes, large pages, which instructions there are.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

// Sleep while the word is `seen`; may return early. Wakers change the word first.
void sleep_while(std::atomic<uint32_t>& word, uint32_t seen);
void wake_one(std::atomic<uint32_t>& word);
void wake_all(std::atomic<uint32_t>& word);

// Between two looks at a word that another thread is about to change.
void pause_a_moment();

// Ask for large pages under mapped memory, where the system has them on request.
void prefer_large_pages(void* memory, size_t bytes);

// True if this processor has all instructions of a qd_isa, and the system lets programs use them.
bool has_instructions(int isa);
