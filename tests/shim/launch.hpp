// Call a kernel's function with arguments from 8-byte slots, once for every thread of every block.
#pragma once

template <typename... Arguments, std::size_t... i>
void call_with(void (*kernel)(Arguments...), const u64* slots, std::index_sequence<i...>) {
    auto read = [&](auto* kind, std::size_t at) {
        std::remove_reference_t<decltype(*kind)> value;
        std::memcpy(&value, slots + at, sizeof(value));
        return value;
    };
    kernel(read((std::remove_cv_t<Arguments>*)nullptr, i)...);
}

template <typename... Arguments>
void launch(void (*kernel)(Arguments...), u32 blocks, u32 threads, u32 shared, const u64* slots) {
    shim::run(blocks, threads, shared,
              [=] { call_with(kernel, slots, std::make_index_sequence<sizeof...(Arguments)>()); });
}

#define LAUNCHER(kernel)                                                                     \
    extern "C" void launch_##kernel(u32 blocks, u32 threads, u32 shared, const u64* slots) { \
        launch(kernel, blocks, threads, shared, slots);                                      \
    }
