// Deals the tokens of a call to threads. Part of products.cpp.

// All tokens, CHUNK at a time: a team on each chunk, or, where there are enough chunks, one thread on each.
template <class Work>
void in_chunks(const Work& work, const float* x, int64_t d_in, float* y, int64_t d_out, int64_t tokens) {
  const int64_t chunks = (tokens + CHUNK - 1) / CHUNK;
  const int size = threads();
  const auto chunk = [&](int64_t c) {
    const int64_t done = c * CHUNK, count = std::min(CHUNK, tokens - done);
    run(work, x + done * d_in, y + done * d_out, count, Team{}, room(work, count));
  };
  if (size == 1) {  // OpenMP makes a team even of one
    for (int64_t c = 0; c < chunks; c++) chunk(c);
    return;
  }
  if (chunks >= size) {
#pragma omp parallel for num_threads(size)
    for (int64_t c = 0; c < chunks; c++) chunk(c);
    return;
  }
  Buffers& shared = room(work, std::min(CHUNK, tokens));
#pragma omp parallel num_threads(size)
  {
    Team team;
#ifdef _OPENMP
    team = Team{omp_get_thread_num(), omp_get_num_threads()};
#endif
    for (int64_t done = 0; done < tokens; done += CHUNK) {
      run(work, x + done * d_in, y + done * d_out, std::min(CHUNK, tokens - done), team, shared);
      team.wait();
    }
  }
}
