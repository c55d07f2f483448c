// A plugin of qemu that counts executed instructions. When the program ends, it writes one line for every block of
// code: its address, its instructions, and how often it ran.

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The part of qemu's interface that is used; Debian does not ship its header.
struct qemu_plugin_tb;
enum { ADD_U64 };
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*)(uint64_t, struct qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb*, int operation, void* to, uint64_t value);
void qemu_plugin_register_atexit_cb(uint64_t id, void (*)(uint64_t, void*), void* data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb*);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb*);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

struct Block {
  uint64_t address, instructions, runs;
  struct Block* next;
};
static struct Block* blocks;
static char* path;

static void translated(uint64_t id, struct qemu_plugin_tb* code) {
  struct Block* block = calloc(1, sizeof *block);
  block->address = qemu_plugin_tb_vaddr(code), block->instructions = qemu_plugin_tb_n_insns(code);
  block->next = blocks, blocks = block;
  qemu_plugin_register_vcpu_tb_exec_inline(code, ADD_U64, &block->runs, 1);
}

static void ended(uint64_t id, void* data) {
  FILE* file = fopen(path, "w");
  for (const struct Block* b = blocks; b; b = b->next)
    fprintf(file, "%" PRIx64 " %" PRIu64 " %" PRIu64 "\n", b->address, b->instructions, b->runs);
  fclose(file);
}

__attribute__((visibility("default"))) int qemu_plugin_install(uint64_t id, const void* info, int n, char** arguments) {
  path = strdup(strchr(arguments[0], '=') + 1);
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, ended, NULL);
  return 0;
}
