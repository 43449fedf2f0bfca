/* A switch in user space: joins network namespaces by links of set rate and delay.
 *
 *   relay PID...          one host per PID: the process whose network namespace it is
 *
 * In every namespace it makes a TAP device eth0 with address 10.77.0.<host + 1>/24, brings it and
 * lo up, and prints "ready". Then it takes one command a line on its standard input and answers
 * each with one line:
 *
 *   shape HOST DELAY_US RATE_MBIT    HOST's link from now on; rate 0 is no limit    -> "ok"
 *   stats                            -> "frames N bytes N dropped N" since the start
 *
 * It ends when its input is closed, and the devices end with it: nothing is left behind by a caller
 * that was killed.
 *
 * Why not the kernel's netem: it is not in every kernel, and not in those of many virtual machines.
 *
 * The model: a frame from host i to host j leaves i's link after the frames before it, at its rate;
 * arrives after the greater of both links' delays; and enters j's link after the frames before it
 * there, at that link's rate, without being stored in between, so that an idle link's rate counts
 * once. Nothing is lost but what exceeds QUEUE_BYTES a host.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include <linux/if_arp.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>

#include "frame_queue.h"

#define MAX_HOSTS 16
#define HEADER_BYTES ((int)sizeof(struct virtio_net_hdr))
#define QUEUE_BYTES (64u << 20)
#define MTU_BYTES 9000
#define READS_IN_A_ROW 16

struct host {
    int tap;
    ns_t delay;
    double ns_per_byte;
    ns_t sends_until, receives_until;
    uint64_t queued_bytes;
};

static struct host hosts[MAX_HOSTS];
static int num_hosts;
static uint64_t num_frames, num_bytes, num_dropped;

static ns_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (ns_t)time.tv_sec * 1000000000u + (ns_t)time.tv_nsec;
}

static ns_t later(ns_t a, ns_t b)
{
    return a > b ? a : b;
}

/* Queue `frame`, which `from` began to send at `start`, for host `to`. */
static void forward(struct frame *frame, int from, int to, ns_t start)
{
    struct host *out = &hosts[from], *in = &hosts[to];
    double bytes = frame->length - HEADER_BYTES;
    ns_t arrives = later(out->sends_until, start + (ns_t)(bytes * in->ns_per_byte));
    arrives += later(out->delay, in->delay);
    in->receives_until = later(arrives, in->receives_until + (ns_t)(bytes * in->ns_per_byte));
    frame->due = in->receives_until;
    frame->to = to;
    frame->number = num_frames++;
    in->queued_bytes += (uint64_t)frame->length;
    push(frame);
}

/* Host of the frame's destination, -1 for all, -2 for nobody here. */
static int destination(const unsigned char *ethernet)
{
    if (ethernet[0] & 1) return -1;
    int host = ethernet[5] - 1;
    return ethernet[0] == 2 && host >= 0 && host < num_hosts ? host : -2;
}

/* Take one frame from `from`'s device; 0 where there is none. */
static int take_one(int from)
{
    struct frame *frame = take_frame();
    ssize_t length = read(hosts[from].tap, frame->data, FRAME_BYTES);
    if (length <= HEADER_BYTES + 14) {
        give_frame(frame);
        return 0;
    }
    frame->length = (int)length;
    num_bytes += (uint64_t)(length - HEADER_BYTES);
    struct host *out = &hosts[from];
    ns_t start = later(now(), out->sends_until);
    out->sends_until = start + (ns_t)((double)(length - HEADER_BYTES) * out->ns_per_byte);
    int to = destination(frame->data + HEADER_BYTES);
    for (int host = 0; host < num_hosts; host++) {
        if (host == from || (to != -1 && host != to)) continue;
        if (hosts[host].queued_bytes + (uint64_t)length > QUEUE_BYTES) {
            num_dropped++;
            continue;
        }
        struct frame *copy = take_frame();
        memcpy(copy->data, frame->data, (size_t)length);
        copy->length = frame->length;
        forward(copy, from, host, start);
    }
    give_frame(frame);
    return 1;
}

static void deliver(ns_t until)
{
    while (next_due() <= until) {
        struct frame *frame = pop();
        if (write(hosts[frame->to].tap, frame->data, (size_t)frame->length) < 0) num_dropped++;
        hosts[frame->to].queued_bytes -= (uint64_t)frame->length;
        give_frame(frame);
    }
}

static void interface_up(int control, const char *name, int host)
{
    struct ifreq request = {0};
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (host >= 0) {
        struct sockaddr_in *address = (struct sockaddr_in *)&request.ifr_addr;
        address->sin_family = AF_INET;
        address->sin_addr.s_addr = htonl(0x0a4d0001u + (uint32_t)host);
        if (ioctl(control, SIOCSIFADDR, &request)) die("SIOCSIFADDR");
        address->sin_addr.s_addr = htonl(0xffffff00u);
        if (ioctl(control, SIOCSIFNETMASK, &request)) die("SIOCSIFNETMASK");
    }
    if (host >= 0) {
        request.ifr_mtu = MTU_BYTES;
        if (ioctl(control, SIOCSIFMTU, &request)) die("SIOCSIFMTU");
    }
    if (ioctl(control, SIOCGIFFLAGS, &request)) die("SIOCGIFFLAGS");
    request.ifr_flags |= IFF_UP | IFF_RUNNING;
    if (ioctl(control, SIOCSIFFLAGS, &request)) die("SIOCSIFFLAGS");
}

/* Make host number `host` in the network namespace of process `pid`. */
static void join(int host, const char *pid)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%s/ns/net", pid);
    int space = open(path, O_RDONLY | O_CLOEXEC);
    if (space < 0 || setns(space, CLONE_NEWNET)) die(path);
    close(space);
    int tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (tap < 0) die("/dev/net/tun");
    struct ifreq request = {0};
    strcpy(request.ifr_name, "eth0");
    request.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    if (ioctl(tap, TUNSETIFF, &request)) die("TUNSETIFF");
    /* No segments larger than a frame: TCP would hear of 64 KiB at once, 5 ms at 100 Mbit/s. */
    if (ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM)) die("TUNSETOFFLOAD");
    memcpy(request.ifr_hwaddr.sa_data, (char[6]){2, 0, 0, 0, 0, (char)(host + 1)}, 6);
    request.ifr_hwaddr.sa_family = ARPHRD_ETHER;
    if (ioctl(tap, SIOCSIFHWADDR, &request)) die("SIOCSIFHWADDR");
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (control < 0) die("socket");
    interface_up(control, "lo", -1);
    interface_up(control, "eth0", host);
    close(control);
    hosts[host].tap = tap;
}

/* Answer the commands that are there; 0 once the input has ended. */
static int obey(void)
{
    static char line[256];
    static size_t filled;
    ssize_t length = read(0, line + filled, sizeof line - 1 - filled);
    if (length <= 0) return length < 0 && errno == EAGAIN;
    filled += (size_t)length;
    for (char *end; (end = memchr(line, '\n', filled));) {
        *end = 0;
        int host;
        double delay_us, rate_mbit;
        if (sscanf(line, "shape %d %lf %lf", &host, &delay_us, &rate_mbit) == 3 && host >= 0 &&
            host < num_hosts && delay_us >= 0 && rate_mbit >= 0) {
            hosts[host].delay = (ns_t)(delay_us * 1000);
            hosts[host].ns_per_byte = rate_mbit > 0 ? 8000.0 / rate_mbit : 0;
            puts("ok");
        } else if (!strcmp(line, "stats")) {
            printf("frames %lu bytes %lu dropped %lu\n", num_frames, num_bytes, num_dropped);
        } else {
            printf("not a command: %s\n", line);
        }
        filled -= (size_t)(end + 1 - line);
        memmove(line, end + 1, filled);
    }
    return filled < sizeof line - 1;
}

int main(int count, char **words)
{
    if (count < 3 || count - 1 > MAX_HOSTS) {
        fprintf(stderr, "relay: give 2 to %d process ids\n", MAX_HOSTS);
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    num_hosts = count - 1;
    for (int host = 0; host < num_hosts; host++) join(host, words[host + 1]);
    /* Sleep as exactly as the kernel can; without the right to, delays are some tens of us more. */
    prctl(PR_SET_TIMERSLACK, 1);
    struct sched_param first = {.sched_priority = 20};
    sched_setscheduler(0, SCHED_FIFO, &first);
    if (fcntl(0, F_SETFL, O_NONBLOCK)) die("standard input");
    puts("ready");
    struct pollfd polled[MAX_HOSTS + 1] = {{.fd = 0, .events = POLLIN}};
    for (int host = 0; host < num_hosts; host++)
        polled[host + 1] = (struct pollfd){.fd = hosts[host].tap, .events = POLLIN};
    for (;;) {
        int took = 0;
        for (int host = 0; host < num_hosts; host++)
            for (int i = 0; i < READS_IN_A_ROW && take_one(host); i++) took = 1;
        ns_t time = now();
        deliver(time);
        if (took) continue;
        ns_t due = next_due(), wait = due > time ? due - time : 0;
        struct timespec timeout = {(time_t)(wait / 1000000000u), (long)(wait % 1000000000u)};
        if (ppoll(polled, (nfds_t)num_hosts + 1, due < NEVER ? &timeout : NULL, NULL) < 0)
            die("ppoll");
        if (polled[0].revents && !obey()) return 0;
    }
}
