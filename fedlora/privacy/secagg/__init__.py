"""Secure aggregation: a server learns the sum of its clients' updates and no single one.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS
2017, https://eprint.iacr.org/2017/281, figure 4, with the signed keys and the consistency
check of section 6 that hold against a server that lies.

    client                            server
    advertise ---- keys, signed ----> waits for the threshold
    share     <--- everybody's keys --
              ---- encrypted shares -> forwards them
    mask      <--- shares ----------
              ---- masked integers --> adds them up
    sign      <--- who has sent -----
              ---- signature --------> collects them
    reveal    <--- signatures --------
              ---- shares -----------> takes off what masks are left

Every message has one length for its session, so that decoding is cutting.
"""
