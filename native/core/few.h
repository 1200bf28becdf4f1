// SPDX-License-Identifier: Apache-2.0
// A vector whose first elements need no allocation: most views have few axes, dims and kv.
#ifndef PORTAKV_FEW_H
#define PORTAKV_FEW_H

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

namespace portakv {

// Holds trivially copyable elements, `N` of them without an allocation. `resize` does not set the
// elements that it adds.
template <typename T, size_t N>
class Few {
  static_assert(std::is_trivially_copyable<T>::value, "elements are moved as bytes");

 public:
  Few() = default;
  ~Few() {
    if (data_ != own()) std::free(data_);
  }
  Few(const T *first, const T *past) { append(first, static_cast<size_t>(past - first)); }
  Few(const Few &other) { append(other.data_, other.size_); }
  Few(Few &&other) noexcept { take(other); }
  Few &operator=(const Few &other) {
    if (this != &other) {
      clear();
      append(other.data_, other.size_);
    }
    return *this;
  }
  Few &operator=(Few &&other) noexcept {
    if (this != &other) {
      if (data_ != own()) std::free(data_);
      data_ = own();
      capacity_ = N;
      take(other);
    }
    return *this;
  }

  T *data() { return data_; }
  const T *data() const { return data_; }
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  T &operator[](size_t i) { return data_[i]; }
  const T &operator[](size_t i) const { return data_[i]; }
  T &back() { return data_[size_ - 1]; }
  const T &back() const { return data_[size_ - 1]; }
  T *begin() { return data_; }
  T *end() { return data_ + size_; }
  const T *begin() const { return data_; }
  const T *end() const { return data_ + size_; }

  void reserve(size_t capacity) {
    if (capacity <= capacity_) return;
    T *larger = static_cast<T *>(std::malloc(capacity * sizeof(T)));
    if (!larger) throw std::bad_alloc();
    if (size_) std::memcpy(static_cast<void *>(larger), data_, size_ * sizeof(T));
    if (data_ != own()) std::free(data_);
    data_ = larger;
    capacity_ = capacity;
  }

  void resize(size_t size) {
    reserve(size);
    size_ = size;
  }

  void push_back(const T &value) {
    const T copy = value;  // it may lie in the memory that moves
    if (size_ == capacity_) reserve(2 * capacity_);
    data_[size_++] = copy;
  }

  void clear() { size_ = 0; }
  void pop_back() { size_--; }

  void erase(T *first, T *past) {
    const size_t behind = static_cast<size_t>(end() - past);
    if (behind && first != past) {
      std::memmove(static_cast<void *>(first), past, behind * sizeof(T));
    }
    size_ -= static_cast<size_t>(past - first);
  }

  void append(const T *first, size_t count) {
    if (size_ + count > capacity_) reserve(2 * (size_ + count));
    if (count) std::memcpy(static_cast<void *>(data_ + size_), first, count * sizeof(T));
    size_ += count;
  }

  void assign(size_t count, const T &value) {
    const T copy = value;
    resize(count);
    for (size_t i = 0; i < count; i++) data_[i] = copy;
  }

 private:
  // Take the elements of another list, which has none then. This list is new.
  void take(Few &other) {
    if (other.data_ == other.own()) {
      if (other.size_) std::memcpy(static_cast<void *>(data_), other.data_, other.size_ * sizeof(T));
    } else {
      data_ = other.data_;
      capacity_ = other.capacity_;
      other.data_ = other.own();
      other.capacity_ = N;
    }
    size_ = other.size_;
    other.size_ = 0;
  }

  T *own() { return reinterpret_cast<T *>(storage_); }

  alignas(T) unsigned char storage_[N * sizeof(T)];
  T *data_ = own();
  size_t size_ = 0;
  size_t capacity_ = N;
};

}  // namespace portakv

#endif
