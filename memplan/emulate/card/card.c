#define _GNU_SOURCE
#include "card.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define ADDRESSES ((size_t)16 << 40) /* fewer where the system has not so many, but four times the memory of all cards, or more for those */
#define CARDS 64
#define PAGE ((size_t)2 << 20) /* the driver's, for all that a caching allocator asks */

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct card the_card;
static char *start, *next[CARDS]; /* the next range begins at next, or ends there where addresses go down */
static size_t addresses, each; /* in all, and of a card, so that one tells its card */
static int down;
static size_t used[CARDS];
static __thread int current;

/* Ranges that were given back. They are handed out again only where no others are left: so an address tells whose it
 * was, and two runs of a program have the same ones. */
static struct range { char *at; size_t bytes; struct range *next; } *back[CARDS];

/* How many cards a program sees: those named, up to the first name that is none's. */
static int visible(int count) {
    const char *told = getenv("CUDA_VISIBLE_DEVICES");
    if (!told) return count;
    int found = 0;
    while (*told && found < count) {
        char *end;
        long number = strtol(told, &end, 10);
        int named = !strncmp(told, "GPU-", 4) || !strncmp(told, "MIG-", 4);
        if (!named && (end == told || number < 0 || number >= count)) break;
        found++;
        told = strchr(told, ',');
        if (!told) break;
        told++;
    }
    return found;
}

/* MEMPLAN_CARD is "cards:bytes:bytes in use:major:minor:multiprocessors:shared memory a block can opt in to:name", as
 * memplan/emulate/cards.py writes it. With MEMPLAN_CARD_ADDRESSES=down the driver puts a range below the last one, not
 * above. */
static void set_up(void) {
    const char *told = getenv("MEMPLAN_CARD");
    struct card *c = &the_card;
    size_t taken = 0;
    if (!told || sscanf(told, "%d:%zu:%zu:%d:%d:%d:%d:%199[^\n]", &c->count, &c->total, &taken, &c->major, &c->minor,
                        &c->multiprocessors, &c->shared_memory, c->name) != 8 || c->count < 1 || c->count > CARDS) {
        fprintf(stderr, "memplan: MEMPLAN_CARD does not describe a card; start programs with memplan dry-run\n");
        exit(2);
    }
    c->visible = visible(c->count);
    addresses = ADDRESSES;
    if (addresses / 4 < c->total * c->count) addresses = 4 * c->total * c->count;
    for (start = MAP_FAILED; start == MAP_FAILED && addresses / 4 >= c->total * c->count; ) {
        start = mmap(NULL, addresses, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (start == MAP_FAILED) addresses /= 2;
    }
    if (start == MAP_FAILED) {
        perror("memplan: addresses for the card");
        exit(2);
    }
    const char *way = getenv("MEMPLAN_CARD_ADDRESSES");
    down = way && !strcmp(way, "down");
    each = addresses / c->count;
    for (int i = 0; i < c->count; i++) {
        size_t first = (size_t)start + i * each;
        next[i] = (char *)((down ? first + each : first + PAGE - 1) / PAGE * PAGE);
        used[i] = taken;
    }
}

const struct card *card(void) {
    pthread_once(&once, set_up);
    return &the_card;
}

int card_current(void) { return current; }

int card_select(int which) {
    if (which < 0 || which >= card()->visible) return 1;
    current = which;
    return 0;
}

int card_of(const void *at) { return card_has(at) ? (int)(((const char *)at - start) / each) : 0; }

size_t card_used(void) {
    card();
    return used[current];
}

int card_take(size_t bytes, int which) {
    size_t total = card()->total;
    pthread_mutex_lock(&lock);
    int full = bytes > total - used[which];
    if (!full) used[which] += bytes;
    pthread_mutex_unlock(&lock);
    return full;
}

void card_give(size_t bytes, int which) {
    pthread_mutex_lock(&lock);
    used[which] -= bytes;
    pthread_mutex_unlock(&lock);
}

static void free_range(struct range *one) { free(one); } /* where `free` is the next free address */

char *card_addresses(size_t bytes) {
    card();
    size_t whole = (bytes + PAGE - 1) / PAGE * PAGE;
    pthread_mutex_lock(&lock);
    char *at = NULL, *first = start + current * each, **free = &next[current];
    if (down && whole <= (size_t)(*free - first)) at = *free -= whole;
    if (!down && whole <= (size_t)(first + each - *free)) at = *free, *free += whole;
    for (struct range **of = &back[current]; !at && *of; of = &(*of)->next) {
        struct range *one = *of;
        if (one->bytes < whole) continue;
        at = one->at;
        one->at += whole, one->bytes -= whole;
        if (!one->bytes) {
            *of = one->next;
            free_range(one);
        }
        break;
    }
    pthread_mutex_unlock(&lock);
    return at;
}

void card_addresses_back(char *at, size_t bytes) {
    size_t whole = (bytes + PAGE - 1) / PAGE * PAGE;
    struct range *made = malloc(sizeof *made), **of = &back[card_of(at)];
    pthread_mutex_lock(&lock);
    while (*of && (*of)->at < at) of = &(*of)->next;
    *made = (struct range){at, whole, *of};
    *of = made;
    for (struct range *one = back[card_of(at)]; one; one = one->next) /* neighbours become one */
        while (one->next && one->at + one->bytes == one->next->at) {
            struct range *joined = one->next;
            one->bytes += joined->bytes;
            one->next = joined->next;
            free_range(joined);
        }
    pthread_mutex_unlock(&lock);
}

int card_map(char *at, size_t bytes, int on) {
    int protection = on ? PROT_READ | PROT_WRITE : PROT_NONE;
    int flags = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    return mmap(at, bytes, protection, flags, -1, 0) == MAP_FAILED;
}

int card_has(const void *at) {
    card();
    return (const char *)at >= start && (const char *)at < start + addresses;
}

static int values_real;

void card_values_are_real(void) { values_real = 1; }
int card_values_real(void) { return values_real; }

void card_copy(void *to, const void *from, size_t bytes) {
    if (bytes <= SMALL || !card_has(to)) memmove(to, from, bytes);
}

void card_fill(void *to, int value, size_t bytes) {
    if (bytes <= SMALL || !card_has(to)) memset(to, value, bytes);
}

/* What a Hopper answers; the limits of CUDA's programming guide that Ampere and newer share. */
int card_attribute(int attribute) {
    const struct card *c = card();
    switch (attribute) {
    case 1: case 2: case 3: return 1024;         /* threads of a block, along x, along y */
    case 4: return 64;                           /* along z */
    case 5: return 2147483647;                   /* blocks along x */
    case 6: case 7: return 65535;                /* along y, z */
    case 8: return 49152;                        /* shared memory of a block */
    case 9: return 65536;                        /* constant memory */
    case 10: return 32;                          /* warp */
    case 11: return 2147483647;                  /* pitch */
    case 12: case 82: return 65536;              /* registers of a block, of a multiprocessor */
    case 13: return 1980000;                     /* clock, kHz */
    case 14: return 512;                         /* texture alignment */
    case 16: return c->multiprocessors;
    case 36: return 2619000;                     /* memory clock, kHz */
    case 37: return 5120;                        /* memory bus, bits */
    case 38: return 50 << 20;                    /* L2 */
    case 39:                                     /* threads of a multiprocessor */
        return c->major == 12 || (c->major == 8 && c->minor) ? 1536 : c->major == 7 && c->minor ? 1024 : 2048;
    case 75: return c->major;
    case 76: return c->minor;
    case 81: return c->shared_memory + 1024;     /* shared memory of a multiprocessor */
    case 97: return c->shared_memory;            /* that a block opts in to */
    case 15: case 18: case 20: case 35: case 50: /* integrated, timeout, exclusive, ECC, PCI domain */
    case 33: case 34: return 0;                  /* PCI bus and device */
    case 106: return 32;                         /* blocks of a multiprocessor */
    case 111: return 1024;                       /* shared memory that the driver keeps of each block */
    case 88: case 100: case 101: case 119: case 128: case 129: case 130: case 132: return 0; /* of the host's, fabric */
    default: return 1;                           /* supported */
    }
}
