/* Frames in the order in which they are due, and frames to use again. */
#ifndef FRAME_QUEUE_H
#define FRAME_QUEUE_H

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FRAME_BYTES (65536 + 128) /* the largest segment that a device hands over, with headers */
#define NEVER UINT64_MAX

typedef uint64_t ns_t;

struct frame {
    ns_t due;
    uint64_t number; /* keeps frames that are due together in order */
    int to, length;
    unsigned char *data;
    struct frame *next_free;
};

static struct frame **heap, *free_frames;
static size_t heap_length, heap_capacity;

static void die(const char *what)
{
    fprintf(stderr, "relay: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int earlier(const struct frame *a, const struct frame *b)
{
    return a->due < b->due || (a->due == b->due && a->number < b->number);
}

static void push(struct frame *frame)
{
    if (heap_length == heap_capacity) {
        heap_capacity = heap_capacity ? 2 * heap_capacity : 1024;
        if (!(heap = realloc(heap, heap_capacity * sizeof *heap))) die("out of memory");
    }
    size_t place = heap_length++;
    for (; place && earlier(frame, heap[(place - 1) / 2]); place = (place - 1) / 2)
        heap[place] = heap[(place - 1) / 2];
    heap[place] = frame;
}

/* When the first frame is due, NEVER where there is none. */
static ns_t next_due(void)
{
    return heap_length ? heap[0]->due : NEVER;
}

/* Take the first frame out. */
static struct frame *pop(void)
{
    struct frame *first = heap[0], *last = heap[--heap_length];
    size_t place = 0;
    for (size_t child; (child = 2 * place + 1) < heap_length; place = child) {
        if (child + 1 < heap_length && earlier(heap[child + 1], heap[child])) child++;
        if (!earlier(heap[child], last)) break;
        heap[place] = heap[child];
    }
    heap[place] = last;
    return first;
}

static struct frame *take_frame(void)
{
    struct frame *frame = free_frames;
    if (frame) {
        free_frames = frame->next_free;
        return frame;
    }
    frame = malloc(sizeof *frame);
    if (!frame || !(frame->data = malloc(FRAME_BYTES))) die("out of memory");
    return frame;
}

static void give_frame(struct frame *frame)
{
    frame->next_free = free_frames;
    free_frames = frame;
}

#endif
