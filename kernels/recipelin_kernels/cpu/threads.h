/* Independent pieces of work, dealt to threads of their own; which thread takes which does not change any number. */
#ifndef RECIPELIN_THREADS
#define RECIPELIN_THREADS
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* Does piece `index` of a call with `room`, memory of the thread's own. */
typedef void Work(const void *call, long index, float *room);

typedef struct {
  Work *work;
  const void *call;
  long pieces, next;
  size_t room; /* numbers */
} Deal;

static inline void *deal_thread(void *given) {
  Deal *deal = given;
  float *room = NULL;
  if (posix_memalign((void **)&room, 64, deal->room * sizeof(float) + 64)) return NULL;
#ifdef POISONED /* of tests: nothing may be read that was not written, also of the piece before */
  memset(room, 0xff, deal->room * sizeof(float));
#endif
  for (;;) {
    long index = __atomic_fetch_add(&deal->next, 1, __ATOMIC_RELAXED);
    if (index >= deal->pieces) break;
    deal->work(deal->call, index, room);
#ifdef POISONED
    memset(room, 0xff, deal->room * sizeof(float));
#endif
  }
  free(room);
  return NULL;
}

/* Returns 0, or 1 where memory is lacking. A thread that cannot be started, or finds none, leaves its share to the others. */
static inline int deal(Work *work, const void *call, long pieces, size_t room, long threads) {
  Deal held = {work, call, pieces, 0, room};
  pthread_t others[256];
  long started = 0;
  if (threads > pieces) threads = pieces;
  while (started < threads - 1 && started < 256 && !pthread_create(&others[started], NULL, deal_thread, &held)) started++;
  deal_thread(&held);
  for (long i = 0; i < started; i++) pthread_join(others[i], NULL);
  return held.next < pieces;
}
#endif
