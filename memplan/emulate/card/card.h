/* The card that is not there: what it says of itself, and its memory, which is handed out and counted.
 *
 * Addresses come out of one reservation, so that an address tells whose it is. Pages exist only once somebody writes
 * to them, and kernels, which would, do not run: an 80 GB card fits in a few MiB of the host's memory.
 */
#pragma once
#include <stddef.h>

#define SMALL (1 << 20) /* copies and fills up to this are carried out: ids, losses, flags, tables */

struct card {
    char name[200];
    size_t total; /* bytes that the driver reports */
    int count;    /* cards alike */
    int visible;  /* of them, as CUDA_VISIBLE_DEVICES has it */
    int major, minor, multiprocessors, shared_memory;
};

const struct card *card(void);
int card_current(void); /* the thread's card */
int card_select(int which); /* 0, or 1 if there is none */
int card_of(const void *at); /* the card that an address is on */
size_t card_used(void); /* of the thread's card */
int card_take(size_t bytes, int which); /* 0, or 1 if the card has no room */
void card_give(size_t bytes, int which);
char *card_addresses(size_t bytes); /* an aligned range, not yet usable; NULL without room for it */
void card_addresses_back(char *at, size_t bytes);
int card_map(char *at, size_t bytes, int on);
int card_has(const void *at);
int card_attribute(int attribute);  /* numbered as cudaDeviceAttr and CUdevice_attribute both are */
void card_values_are_real(void); /* somebody works out whole numbers: what is read back is what is there */
int card_values_real(void);
void card_copy(void *to, const void *from, size_t bytes);
void card_fill(void *to, int value, size_t bytes);
