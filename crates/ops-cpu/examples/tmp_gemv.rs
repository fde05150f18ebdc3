//! Temporary.
use cadre_ops::*; use cadre_ops_cpu::*; use cadre_types::NumericsClass;
fn main() {
    let n: usize = std::env::args().nth(1).unwrap().parse().unwrap();
    let k: usize = std::env::args().nth(2).unwrap().parse().unwrap();
    let m: usize = std::env::args().nth(3).unwrap().parse().unwrap();
    let b = CpuBackend::new(CpuOptions { threads: Some(1), ..CpuOptions::new(NumericsClass::Bf16) }).unwrap();
    let codes: Vec<u8> = (0..n*k).map(|i| ((i * 2654435761) >> 13) as u8 & 0x9f | 0x20).collect();
    let scales = vec![0.01; n.div_ceil(128) * k.div_ceil(128)];
    let w = b.load_matrix(HostMatrix { rows: n, cols: k, data: MatrixData::E4m3 { codes: &codes, scales: &scales } }).unwrap();
    let x = b.alloc(m, k).unwrap(); let mut y = b.alloc(m, n).unwrap();
    let mut q = b.queue().unwrap();
    let mut best = f64::MAX;
    for _ in 0..(3000_000_000 / (n * k * m).max(1_000_000)) { let t = std::time::Instant::now(); for _ in 0..2 { b.linear(&mut q, &x, &w, m, &mut y).unwrap(); } best = best.min(t.elapsed().as_secs_f64() / 2.0); }
    println!("{n} {k} {m}: {:.2} us {:.1} GB/s {:.1} GFLOP/s", best * 1e6, (n * k) as f64 / best / 1e9, (2 * n * k * m) as f64 / best / 1e9);
}
