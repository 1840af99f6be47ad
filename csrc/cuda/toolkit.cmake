# Which nvcc can compile csrc/cuda beside a torch, and for which GPUs it does.
#
# look_at_nvcc(<program> <torch's CUDA, may be empty>) sets in the scope of its caller
#   nvcc_version        major and minor, such as 12.4
#   cuda_architectures  as CMAKE_CUDA_ARCHITECTURES takes them
#   why_not_nvcc        why this nvcc cannot be used, in words; empty if it can

function(look_at_nvcc program torch_cuda)
  set(nvcc_version "")
  set(cuda_architectures "")
  set(why_not_nvcc "${program} does not run as nvcc")
  execute_process(COMMAND "${program}" --version OUTPUT_VARIABLE answer ERROR_QUIET)
  if(answer MATCHES "release ([0-9]+)\\.([0-9]+)")
    set(major "${CMAKE_MATCH_1}")
    set(nvcc_version "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
    string(REGEX MATCH "^[0-9]+" torch_major "${torch_cuda}")
    # 8.6, 8.7 and 8.9 run the machine code of 8.0. The entry that is "virtual", or is not "real",
    # is kept as PTX too, which the driver compiles for architectures that come later.
    if(nvcc_version VERSION_LESS 12.8)
      set(cuda_architectures 80-real 90a-real 90-virtual)
    else()
      set(cuda_architectures 80-real 90a-real 120-real 100)
    endif()
    if(nvcc_version VERSION_LESS 12.0)
      set(why_not_nvcc "${program} is nvcc ${nvcc_version}, and C++20 needs 12.0 or newer")
    elseif(torch_major AND NOT major STREQUAL torch_major)
      string(CONCAT why_not_nvcc "${program} is of CUDA ${nvcc_version} and torch of "
             "${torch_cuda}, and their major versions must be equal")
    else()
      try_nvcc("${program}" "${cuda_architectures}")
    endif()
  endif()
  return(PROPAGATE nvcc_version cuda_architectures why_not_nvcc)
endfunction()

# Compiles a kernel that does nothing, and sets `why_not_nvcc` to what nvcc had to say against it.
# An nvcc may not know an architecture, and may refuse the C++ compiler that it finds.
function(try_nvcc program architectures)
  set(options -std=c++20)
  if(DEFINED ENV{CUDAHOSTCXX})
    list(APPEND options -ccbin "$ENV{CUDAHOSTCXX}")
  endif()
  foreach(architecture IN LISTS architectures)
    string(REGEX MATCH "^[0-9]+a?" number "${architecture}")
    set(code "[sm_${number},compute_${number}]")
    if(architecture MATCHES "-real$")
      set(code "sm_${number}")
    elseif(architecture MATCHES "-virtual$")
      set(code "compute_${number}")
    endif()
    list(APPEND options -gencode "arch=compute_${number},code=${code}")
  endforeach()
  set(folder "${CMAKE_BINARY_DIR}/CMakeFiles/adatape_nvcc")
  file(WRITE "${folder}/probe.cu" "__global__ void probe() {}\n")
  execute_process(COMMAND "${program}" ${options} -c probe.cu -o probe.o
                  WORKING_DIRECTORY "${folder}" RESULT_VARIABLE status
                  OUTPUT_VARIABLE said ERROR_VARIABLE said)
  set(why_not_nvcc "")
  if(NOT status EQUAL 0)
    # The reason becomes part of a macro, which takes neither quotes nor signs of CMake or a shell.
    if(NOT said MATCHES "(nvcc fatal|[^\n]*error)[^\n]*")
      string(REGEX MATCH "[^\n]*" said "${said}")
    else()
      set(said "${CMAKE_MATCH_0}")
    endif()
    string(REPLACE "\"" "'" said "${said}")
    string(REGEX REPLACE "[^A-Za-z0-9_ .,:()/=+*<>'-]+" " " said "${said}")
    string(REGEX REPLACE " +" " " said "${said}")
    string(STRIP "${said}" said)
    set(why_not_nvcc "${program} cannot compile for GPUs: ${said}")
  endif()
  return(PROPAGATE why_not_nvcc)
endfunction()
