/* A load of prepared requests from many clients at once, as cheap as can be: closed loops over kept connections, one thread.

   load HOST PORT CLIENTS PATH BODIES ACKNOWLEDGED

   BODIES: one JSON body a line; each is POSTed to PATH once, by whichever client is free. A body answered 201 counts as
   acknowledged: its line number (from 0) is written to ACKNOWLEDGED. Prints one JSON object; exit status 1 where the load
   could not be run at all. Linux (epoll). */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { LONGEST_REPLY = 65536, LONGEST_REQUEST = 65536, PATIENCE_MS = 60000 };

struct client {
    int fd;
    size_t line; /* of the body under way */
    double begun_s;
    size_t had;
    char reply[LONGEST_REPLY + 1];
};

static const char *host, *path;
static char **lines; /* where each body begins; lines[n_lines] is the end */
static size_t n_lines, next_line, n_acknowledged, n_errors, n_under_way;
static double *latency_s;
static FILE *acknowledged;
static int first_bad_status;

static void die(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

static void read_bodies(const char *name) {
    struct stat about;
    int fd = open(name, O_RDONLY);
    if (fd < 0 || fstat(fd, &about) < 0) die(name);
    char *text = mmap(NULL, about.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (text == MAP_FAILED) die(name);
    for (char *at = text, *end = text + about.st_size; at < end;) {
        if (n_lines % 4096 == 0) lines = realloc(lines, (n_lines + 4098) * sizeof *lines);
        if (lines == NULL) die("memory");
        lines[n_lines++] = at;
        at = memchr(at, '\n', end - at);
        at = at == NULL ? end : at + 1;
        lines[n_lines] = at;
    }
    if (n_lines == 0) { errno = ENODATA; die(name); }
    latency_s = malloc(n_lines * sizeof *latency_s);
    if (latency_s == NULL) die("memory");
}

/* The client goes out of use; what it had under way is not acknowledged. */
static void give_up(struct client *one, int is_error) {
    n_errors += is_error;
    close(one->fd);
    one->fd = -1;
    n_under_way--;
}

static void send_next(struct client *one) {
    static char request[LONGEST_REQUEST];
    if (next_line >= n_lines) { give_up(one, 0); return; }
    one->line = next_line++;
    size_t length = lines[one->line + 1] - lines[one->line];
    if (lines[one->line + 1][-1] == '\n') length--;
    int head = snprintf(request, sizeof request,
                        "POST %s HTTP/1.1\r\nhost: %s\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n", path,
                        host, length);
    if (head + length > sizeof request) { errno = EMSGSIZE; die("a body"); }
    memcpy(request + head, lines[one->line], length);
    one->had = 0;
    one->begun_s = now_s();
    if (send(one->fd, request, head + length, MSG_NOSIGNAL) != (ssize_t)(head + length)) give_up(one, 1);
}

/* Whether the reply is whole; its status. Replies have a content-length. */
static int whole_status(struct client *one) {
    one->reply[one->had] = 0;
    char *body = strstr(one->reply, "\r\n\r\n");
    if (body == NULL) return 0;
    char *length = strcasestr(one->reply, "\r\ncontent-length:");
    size_t wanted = length != NULL && length < body ? strtoul(length + 17, NULL, 10) : 0;
    if (one->had < (size_t)(body + 4 - one->reply) + wanted) return 0;
    return one->had > 12 ? atoi(one->reply + 9) : -1;
}

static void receive(struct client *one) {
    ssize_t got = recv(one->fd, one->reply + one->had, LONGEST_REPLY - one->had, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got <= 0) { give_up(one, 1); return; }
    one->had += got;
    int status = whole_status(one);
    if (status == 0) return;
    if (status == 201) {
        latency_s[n_acknowledged++] = now_s() - one->begun_s;
        fprintf(acknowledged, "%zu\n", one->line);
    } else {
        n_errors++;
        if (first_bad_status == 0) first_bad_status = status;
    }
    send_next(one);
}

static void open_client(struct client *one, int epoll, int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    int yes = 1;
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1) { errno = EINVAL; die(host); }
    one->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (one->fd < 0 || connect(one->fd, (struct sockaddr *)&address, sizeof address) < 0) die("connect");
    setsockopt(one->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    fcntl(one->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = one};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, one->fd, &event) < 0) die("epoll");
    n_under_way++;
}

static int by_size(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static double percentile_ms(double share) {
    return n_acknowledged ? 1000 * latency_s[(size_t)(share * (n_acknowledged - 1))] : 0;
}

int main(int argc, char **argv) {
    if (argc != 7) { fprintf(stderr, "load HOST PORT CLIENTS PATH BODIES ACKNOWLEDGED\n"); return 1; }
    host = argv[1], path = argv[4];
    int n_clients = atoi(argv[3]), epoll = epoll_create1(0);
    read_bodies(argv[5]);
    acknowledged = fopen(argv[6], "w");
    if (acknowledged == NULL) die(argv[6]);
    struct client *clients = calloc(n_clients, sizeof *clients);
    if (clients == NULL || epoll < 0) die("memory");
    for (int i = 0; i < n_clients; i++) open_client(&clients[i], epoll, atoi(argv[2]));
    double begun_s = now_s();
    for (int i = 0; i < n_clients; i++) send_next(&clients[i]);
    struct epoll_event events[256];
    while (n_under_way > 0) {
        int n = epoll_wait(epoll, events, 256, PATIENCE_MS);
        if (n < 0 && errno != EINTR) die("epoll");
        if (n == 0) { n_errors += n_under_way; break; } /* the server has gone silent */
        for (int i = 0; i < n; i++) receive(events[i].data.ptr);
    }
    double seconds = now_s() - begun_s;
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu_s = used.ru_utime.tv_sec + used.ru_stime.tv_sec + 1e-6 * (used.ru_utime.tv_usec + used.ru_stime.tv_usec);
    qsort(latency_s, n_acknowledged, sizeof *latency_s, by_size);
    printf("{\"acknowledged\": %zu, \"errors\": %zu, \"first_bad_status\": %d, \"seconds\": %.6f, \"cpu_s\": %.3f, "
           "\"p50_ms\": %.3f, \"p99_ms\": %.3f, \"max_ms\": %.3f}\n",
           n_acknowledged, n_errors, first_bad_status, seconds, cpu_s, percentile_ms(0.5), percentile_ms(0.99),
           percentile_ms(1));
    return 0;
}
