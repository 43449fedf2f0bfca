/* An NVTX tool for tests: writes every range that reaches it to a file, one JSON object a line.

   NVTX loads the library that NVTX_INJECTION64_PATH names and calls InitializeInjectionNvtx2, which
   puts its own functions into the tables of callbacks. The declarations below are the part of NVTX
   version 3's binary interface that this takes (nvtx3/nvToolsExt.h and nvtxDetail/nvtxTypes.h of
   https://github.com/NVIDIA/NVTX), so that no CUDA headers are needed.

   gcc -shared -fPIC -O1 nvtx_listener.c -o listener.so ; NVTX_LOG=file NVTX_INJECTION64_PATH=... */

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*Function)(void);

typedef struct {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    union { int64_t integer; double real; } payload;
    int32_t message_type;
    union { const char *ascii; const struct Text *registered; } message;
} Attributes;

typedef struct {
    size_t size;
    int (*get_table)(int module, Function ***table, unsigned *size);
} Callbacks;

enum { CALLBACKS = 1, MODULE_CORE2 = 5 };
enum { RANGE_PUSH = 4, RANGE_POP = 5, REGISTER_STRING = 10, DOMAIN_CREATE = 12 };
enum { ASCII = 1, REGISTERED = 3, INT64 = 2 };

struct Text { char text[256]; };

static FILE *out;
static _Thread_local int depth;

static struct Text *keep(const char *text) {
    struct Text *kept = calloc(1, sizeof *kept);
    snprintf(kept->text, sizeof kept->text, "%s", text);
    return kept;
}

static struct Text *on_domain_create(const char *name) { return keep(name); }

static struct Text *on_register(struct Text *domain, const char *text) {
    (void)domain;
    return keep(text);
}

static int on_push(struct Text *domain, const Attributes *given) {
    const char *message = "";
    if (given->message_type == ASCII) message = given->message.ascii;
    if (given->message_type == REGISTERED) message = given->message.registered->text;
    fprintf(out, "{\"event\": \"push\", \"domain\": \"%s\", \"message\": \"%s\", \"depth\": %d",
            domain ? domain->text : "", message, depth);
    if (given->payload_type == INT64) fprintf(out, ", \"payload\": %lld", (long long)given->payload.integer);
    fprintf(out, "}\n");
    return depth++;
}

static int on_pop(struct Text *domain) {
    depth--;
    fprintf(out, "{\"event\": \"pop\", \"domain\": \"%s\", \"depth\": %d}\n",
            domain ? domain->text : "", depth);
    return depth;
}

__attribute__((visibility("default"))) int InitializeInjectionNvtx2(const void *(*export_table)(uint32_t)) {
    const Callbacks *callbacks = export_table(CALLBACKS);
    Function **table;
    unsigned size;
    const char *path = getenv("NVTX_LOG");
    /* Several processes may write to one file. */
    out = path ? fopen(path, "a") : NULL;
    if (!out || !callbacks || !callbacks->get_table(MODULE_CORE2, &table, &size)) return 0;
    setvbuf(out, NULL, _IOLBF, 0);
    *table[RANGE_PUSH] = (Function)on_push;
    *table[RANGE_POP] = (Function)on_pop;
    *table[REGISTER_STRING] = (Function)on_register;
    *table[DOMAIN_CREATE] = (Function)on_domain_create;
    return 1;
}
